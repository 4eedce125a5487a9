"""The compiler: shared results, limits of time, and the door of AsyncLLM."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import wait
from dataclasses import replace

import pytest

from jaxserve import SamplingParams, StructuredOutputsParams
from jaxserve.admission import Admission
from jaxserve.async_llm import AsyncLLM
from jaxserve.errors import RequestError
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.vocabulary import build_vocabulary
from tests.patience import PATIENCE
from tests.scripted import ScriptedClient, scripted_info
from tests.structured.matching import TOKENIZER
from tests.tiny import EOS, IM_END, TOOL_CALL, VOCAB_SIZE

YES_OR_NO = StructuredOutputsParams(choice=["yes", "no"])


def new_compiler(**options: object) -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB_SIZE, (EOS, IM_END), **options)  # type: ignore[arg-type]  # by name


def test_a_grammar_is_compiled_once_while_it_is_remembered() -> None:
    compiler = new_compiler(cache_size=2)
    texts = [compiler.text(StructuredOutputsParams(regex=letter)) for letter in "abc"]
    first = compiler.compile(texts[0])
    assert compiler.compile(texts[0]) is first
    others = [compiler.compile(texts[1])]
    assert compiler.compile(texts[0]) is first
    others.append(compiler.compile(texts[2]))  # the one used longest ago goes
    assert compiler.compile(texts[0]) is first
    compiler.forget(texts[0])
    others.append(compiler.compile(texts[0]))
    assert others[-1] is not first
    wait([first, *others], PATIENCE)


def test_long_grammars_push_out_others() -> None:
    compiler = new_compiler()
    short = compiler.text(YES_OR_NO)
    first = compiler.compile(short)
    others = [compiler.compile(f'start: "{letter}"\n//{"x" * 400_000}') for letter in "abc"]
    others.append(compiler.compile(short))
    assert others[-1] is not first
    assert [made.result(PATIENCE).error for made in (first, *others)] == [""] * 5


def test_what_is_wrong_is_remembered_too() -> None:
    compiler = new_compiler()
    for _ in range(2):
        refusal = compiler.check(StructuredOutputsParams(regex="[")).result(PATIENCE)
        assert "unclosed" in str(refusal)


def test_a_model_without_an_end_token_is_refused() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, (VOCAB_SIZE + 5,))
    compiler.warm_up()
    assert "needs an end token" in str(compiler.check(YES_OR_NO).result(PATIENCE))


def test_threads_end_with_their_compiler() -> None:
    before = set(threading.enumerate())
    compiler = new_compiler()
    compiler.check(YES_OR_NO).result(PATIENCE)
    threads = [thread for thread in threading.enumerate() if thread not in before]
    threads = [thread for thread in threads if thread.name.startswith("grammars")]
    assert threads
    is_gone = threading.Event()
    weakref.finalize(compiler, is_gone.set)
    del compiler
    deadline = time.monotonic() + PATIENCE
    while not is_gone.wait(0.01) and time.monotonic() < deadline:
        gc.collect()  # again: a thread may have held the call that it had made
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 2, VOCAB_SIZE, VOCAB_SIZE + 90])
def test_a_vocabulary_has_the_size_of_the_models(vocab_size: int) -> None:
    vocabulary = build_vocabulary(TOKENIZER, vocab_size, (IM_END, EOS))
    assert vocabulary.vocab_size == vocab_size
    assert vocabulary.eos_tokens == [IM_END, EOS]
    assert vocabulary.is_special_token(TOOL_CALL) == (vocab_size > TOOL_CALL)
    # A mark written as text is spelled out, or a grammar could not ask for its characters.
    assert vocabulary.tokenize_str("a<tool_call>") == list(b"a<tool_call>")


def new_llm(client: ScriptedClient) -> AsyncLLM:
    return AsyncLLM(client, TOKENIZER, GenerationDefaults(eos_token_ids=(EOS, IM_END)))


async def test_the_door_checks_a_constraint() -> None:
    llm = new_llm(client := ScriptedClient())
    await llm.check_structured(None)
    await llm.check_structured(replace(YES_OR_NO, param="response_format"))
    with pytest.raises(RequestError, match="unclosed") as caught:
        await llm.check_structured(StructuredOutputsParams(regex="[", param="response_format"))
    assert caught.value.param == "response_format"
    stream = llm.generate("a", SamplingParams(structured_outputs=YES_OR_NO))
    assert [output async for output in stream][-1].finished
    (core,) = client.submitted
    assert core.params.structured_outputs is None
    assert core.grammar == new_compiler().text(YES_OR_NO), "the engine gets text"
    llm.shutdown()


async def test_the_door_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    llm = new_llm(ScriptedClient())
    compiler = llm._admission.grammars
    compiler.time_limit = 0.05
    held = threading.Event()
    for _ in range(2):
        compiler._workers.submit(held.wait)
    with pytest.raises(RequestError, match="took longer than") as caught:
        await llm.check_structured(replace(YES_OR_NO, param="tools"))
    assert caught.value.param == "tools"
    held.set()
    compiler.time_limit = PATIENCE
    await llm.check_structured(YES_OR_NO)
    told = [record for record in caplog.records if record.name in ("asyncio", "concurrent.futures")]
    assert not told, "who has left disturbs nobody"
    llm.shutdown()


def test_a_request_carries_its_own_fault_back() -> None:
    admission = Admission(scripted_info(), TOKENIZER, GenerationDefaults(eos_token_ids=(EOS,)))
    with pytest.raises(RequestError) as caught:
        admission.admit("r", "a", SamplingParams(structured_outputs=StructuredOutputsParams(grammar="x")))
    assert caught.value.param == "structured_outputs"
