"""Sequences that follow a grammar, in the tiny engine: they do, and nobody else notices."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams, StructuredOutputsParams
from jaxserve.assembly import EngineParts
from jaxserve.engine.client import InProcessClient
from jaxserve.engine.lattice import ForwardShape
from jaxserve.engine.pace import Pace
from jaxserve.engine.protocol import CoreRequest
from jaxserve.engine.runner import Runner
from jaxserve.errors import RequestError
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.structured import compiler
from jaxserve.structured.compiler import GrammarCompiler
from tests.engine.tiny_engine import Collector, DenseModel, build_constrained, request, wait_until_idle
from tests.patience import PATIENCE
from tests.tiny import ASCII_EOS, ASCII_MARK, ASCII_VOCAB_SIZE, ascii_tokenizer

TOKENIZER = ascii_tokenizer()
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["yes", "no"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ON_CPU = jax.default_backend() == "cpu"
FORCED = "the name is yes"  # what a grammar may spell out

Engine = tuple[InProcessClient, Collector, GrammarCompiler]


@pytest.fixture(scope="module")
def grammars() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, ASCII_VOCAB_SIZE, (ASCII_EOS,), time_limit=PATIENCE)


@pytest.fixture(scope="module")
def module_engine(cache_dir: str, grammars: GrammarCompiler) -> Iterator[Engine]:
    client, collector = build_constrained(cache_dir, grammars), Collector()
    client.start(collector.on_outputs, collector.on_dead)
    yield client, collector, grammars
    client.shutdown()


@pytest.fixture
def engine(module_engine: Engine) -> Engine:
    client, collector, _ = module_engine
    assert client.reset_prefix_cache()
    collector.outputs.clear()
    return module_engine


def constrained(
    engine: Engine, request_id: str, constraint: dict[str, Any], prompt: str = "x", **params: Any
) -> CoreRequest:
    """A sampled answer that follows a constraint; ends at the end token unless told to ignore it."""
    settings: dict[str, Any] = {"temperature": 1.0, "max_tokens": 60, "seed": 1} | params
    eos = () if settings.get("ignore_eos") else (ASCII_EOS,)
    core = request(request_id, TOKENIZER.encode(prompt), eos=eos, **settings)
    return replace(core, grammar=engine[2].text(StructuredOutputsParams(**constraint)))


def run(engine: Engine, *requests: CoreRequest) -> list[list[int]]:
    client, collector, _ = engine
    client.submit(requests)
    ids = [r.request_id for r in requests]
    collector.wait(*ids)
    assert collector.error is None
    assert client.stats().num_free_pages == client.stats().num_pages
    return [collector.tokens(i) for i in ids]


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids)


def failure(engine: Engine, core: CoreRequest) -> str:
    engine[0].submit([core])
    engine[1].wait(core.request_id)
    output = engine[1].outputs[core.request_id][-1]
    assert output.finish_reason == "error"
    assert output.error_param == "structured_outputs"
    assert output.error is not None
    return output.error


def test_answers_follow_their_grammar_and_end(engine: Engine) -> None:
    import jsonschema  # here, so that machines without development packages can collect the rest

    cores = [
        constrained(engine, f"j{i}", {"json": PERSON, "disable_any_whitespace": True}, seed=i, max_tokens=80)
        for i in range(6)
    ]
    cores += [constrained(engine, f"c{i}", {"choice": ["yes", "name", "12 a"]}, seed=i) for i in range(6)]
    cores += [constrained(engine, f"r{i}", {"regex": "[a-d]{3}(-[0-9]{2}){1,2}"}, seed=i) for i in range(6)]
    cores += [constrained(engine, "g", {"grammar": 'start: "a" <mark> "b"+ <mark>'}, temperature=0.0)]
    answers = dict(zip([core.request_id for core in cores], run(engine, *cores), strict=True))
    for request_id, token_ids in answers.items():
        last = engine[1].outputs[request_id][-1]
        if request_id == "g" and last.finish_reason == "length":  # greedy, it may say b for ever
            continue
        assert last.finish_reason == "stop"
        assert token_ids[-1] == ASCII_EOS
        text = text_of(token_ids)
        if request_id[0] == "j":
            jsonschema.validate(json.loads(text), PERSON)
        elif request_id[0] == "c":
            assert text in ("yes", "name", "12 a")
        elif request_id[0] == "r":
            assert re.fullmatch("[a-d]{3}(-[0-9]{2}){1,2}", text)
    assert answers["g"][1] == ASCII_MARK
    assert len({tuple(answers[f"j{i}"]) for i in range(6)}) > 1, "within the grammar the model chooses"


def test_the_same_answer_alone_and_in_company(engine: Engine, dense: DenseModel) -> None:
    rng = random.Random(4)
    plain = [[rng.randrange(100) for _ in range(rng.choice([1, 9, 30]))] for _ in range(4)]
    company = [request(f"p{i}", prompt, max_tokens=12) for i, prompt in enumerate(plain)]
    mixes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"json": PERSON}, {"seed": 11}),
        ({"json": PERSON, "disable_any_whitespace": True}, {"seed": 12, "frequency_penalty": 0.5}),
        ({"regex": f"({FORCED}){{2}} [a-z]+"}, {"seed": 13, "top_k": 5}),
        ({"regex": f"[a-z]+ {FORCED}[0-9]+"}, {"seed": 14, "logprobs": 2}),
        ({"choice": [FORCED, "no"]}, {"temperature": 0.0}),
    ]
    cores = [
        constrained(engine, f"m{i}", constraint, "some prompt " * (i + 1), **params)
        for i, (constraint, params) in enumerate(mixes)
    ]
    mixed = [core for pair in zip(company, cores, strict=False) for core in pair] + cores[4:]
    answers = dict(zip([core.request_id for core in mixed], run(engine, *mixed), strict=True))
    for prompt, core in zip(plain, company, strict=True):
        assert answers[core.request_id] == dense.greedy(prompt, 12)
    for core in cores:
        engine[1].outputs.clear()
        assert engine[0].reset_prefix_cache()
        assert run(engine, core) == [answers[core.request_id]]


def test_forced_tokens_are_not_sampled_one_by_one(engine: Engine) -> None:
    constraint = {"regex": f"{FORCED}, [a-c]{FORCED}"}
    before = engine[0].stats().num_steps
    (ahead,) = run(engine, constrained(engine, "ahead", constraint))
    assert re.fullmatch(constraint["regex"], text_of(ahead))
    assert engine[0].stats().num_steps - before < len(ahead) / 2
    # Where somebody asks for log-probabilities they are sampled, and are the same.
    (sampled,) = run(engine, constrained(engine, "sampled", constraint, logprobs=1))
    assert sampled == ahead


def test_forced_tokens_run_in_rows_that_a_decode_step_has_to_spare(
    engine: Engine, dense: DenseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    call = Runner._call_forward

    def noting(runner: Runner, shape: ForwardShape, *args: Any) -> Any:
        names.append(shape.name)
        return call(runner, shape, *args)

    monkeypatch.setattr(Runner, "_call_forward", noting)
    other = request("other", [1, 2, 3, 4, 5, 6], max_tokens=10)
    core = constrained(engine, "forced", {"regex": f"[a-c]{FORCED}[a-c]"}, prompt="a question")
    assert core.grammar is not None
    engine[2].compile(core.grammar).result(PATIENCE)  # so that both start together
    told, answer = run(engine, other, core)
    assert told == dense.greedy(other.prompt_token_ids, 10)
    assert FORCED in text_of(answer)
    mixed = [name for name in names if "mixed" in name]
    assert len(mixed) <= 2 if ON_CPU else mixed, "only prompts need others, where padding rows can be used"


def test_the_forward_pass_does_not_wait_for_masks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def note(name: str) -> None:
        function = getattr(Runner, name)

        def noting(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(Runner, name, noting)

    class Steady(Pace):
        """Of a host that keeps up, however slow this one is."""

        def observe(self, num_steps: int, worked: float, waited: float, *, is_single: bool) -> None:
            pass

    wait_until_idle(engine[0])
    monkeypatch.setattr(engine[0]._core, "_pace", Steady())
    monkeypatch.setattr(engine[0]._core._scheduler, "burst_steps", 1)
    for name in ("dispatch", "start", "finish", "fetch"):
        note(name)
    run(engine, constrained(engine, "c", {"regex": "[a-z]{6}"}, seed=2))
    # The prompt's step waits for nothing; then each forward pass is under way before the step ahead is fetched.
    assert calls[:8] == ["start", "finish", "start", "fetch", "finish", "start", "fetch", "finish"]
    assert "dispatch" not in calls
    wait_until_idle(engine[0])
    calls.clear()
    run(engine, request("p", [1, 2, 3], max_tokens=6))
    assert calls[:5] == ["dispatch", "dispatch", "fetch", "dispatch", "fetch"]


def test_log_probabilities_are_the_models_own(engine: Engine, dense: DenseModel) -> None:
    core = constrained(engine, "l", {"regex": f"{FORCED}[a-z]"}, logprobs=3, prompt_logprobs=0, prompt="abc")
    (token_ids,) = run(engine, core)
    outputs = engine[1].outputs["l"]
    told = [item for output in outputs for item in output.logprobs or []]
    assert [item.token_id for item in told] == token_ids
    wanted = dense.log_probs(core.prompt_token_ids + token_ids)
    for position, item in enumerate(told, len(core.prompt_token_ids) - 1):
        assert item.logprob == pytest.approx(wanted[position, item.token_id], abs=1e-4)
        assert item.top_ids == np.argsort(-wanted[position], kind="stable")[:3].tolist()
    assert outputs[0].prompt_logprobs is not None
    assert len(outputs[0].prompt_logprobs) == 2


def test_forced_beginnings_keep_the_prompts_log_probabilities(engine: Engine) -> None:
    core = constrained(engine, "f", {"regex": f"{FORCED}[a-z]"}, prompt_logprobs=0, prompt="abcdef")
    run(engine, core)
    first = engine[1].outputs["f"][0]
    assert len(first.token_ids) > 3
    assert first.prompt_logprobs is not None
    assert [item.token_id for item in first.prompt_logprobs] == core.prompt_token_ids[1:]


@pytest.fixture(scope="module")
def small_engine(cache_dir: str, grammars: GrammarCompiler) -> Iterator[Engine]:
    """An engine with too few pages for its sequences."""
    client, collector = (
        build_constrained(cache_dir, grammars, kv_cache_memory=17 * 2 * 8 * 2 * 2 * 8 * 4, max_model_len=100),
        Collector(),
    )
    client.start(collector.on_outputs, collector.on_dead)
    yield client, collector, grammars
    client.shutdown()


def test_preempted_sequences_go_on_where_they_were(engine: Engine, small_engine: Engine) -> None:
    cores = [
        constrained(
            engine, f"p{i}", {"regex": f"([a-e]{FORCED}){{2,4}}"}, "some prompt", seed=i, max_tokens=60
        )
        for i in range(8)
    ]
    wanted = run(engine, *cores)
    assert run(small_engine, *cores) == wanted
    assert small_engine[0].stats().num_preemptions > 0


def random_request(engine: Engine, request_id: str, rng: random.Random) -> CoreRequest:
    params: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.5]),
        "seed": rng.randrange(99),
        "max_tokens": rng.choice([1, 3, 20, 60]),
        "logprobs": rng.choice([None, None, None, 1]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.0, 0.5]),
        "ignore_eos": rng.random() < 0.1,
    }
    prompt = "".join(rng.choices("abc xyz", k=rng.randint(1, 30)))
    if rng.random() < 0.3:
        return request(request_id, TOKENIZER.encode(prompt), eos=(ASCII_EOS,), **params)
    constraint: dict[str, Any] = rng.choice(
        [
            {"json": PERSON},
            {"json": PERSON, "disable_any_whitespace": True},
            {"json_object": True},
            {"regex": f"([a-e]{FORCED}){{1,4}}"},
            {"regex": "[a-z ]{5,60}"},
            {"choice": ["yes", "no", FORCED]},
            {"grammar": 'start: "a" <mark> /[a-c]+/ <mark>'},
        ]
    )
    core = constrained(engine, request_id, constraint, prompt, **params)
    b, e = TOKENIZER.encode("b"), TOKENIZER.encode("e")
    if rng.random() < 0.15:
        core = replace(core, bad_word_ids=((b[0],), (e[0], e[0])))
    if rng.random() < 0.15:
        core = replace(core, stop_token_ids=tuple(e))
    return core


def test_whatever_comes_and_goes_answers_stay_the_same(small_engine: Engine) -> None:
    client, collector, _ = small_engine
    rng = random.Random(8)
    cores = [random_request(small_engine, f"w{i}", rng) for i in range(60)]
    gone = set()
    for start in range(0, len(cores), 12):
        client.submit(cores[start : start + 12])
        collector.wait_for_output(cores[start].request_id)
        gone |= {core.request_id for core in cores[start + 1 : start + 12] if rng.random() < 0.2}
        client.abort([request_id for request_id in gone if not collector.outputs.get(request_id)])
    stayed = [core for core in cores if core.request_id not in gone]
    collector.wait(*(core.request_id for core in stayed))

    def told(core: CoreRequest) -> tuple[list[int], str | None]:
        outputs = collector.outputs[core.request_id]
        return collector.tokens(core.request_id), outputs[-1].finish_reason

    answers = [told(core) for core in stayed]
    assert client.stats().num_preemptions > 0
    client.abort([*gone])
    for core, answer in zip(stayed, answers, strict=True):
        collector.outputs.clear()
        client.submit([core])
        collector.wait(core.request_id)
        assert told(core) == answer


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_max_tokens_cuts(engine: Engine, count: int) -> None:
    (token_ids,) = run(engine, constrained(engine, "m", {"regex": FORCED * 3}, max_tokens=count))
    assert len(token_ids) == count
    assert engine[1].outputs["m"][-1].finish_reason == "length"
    assert FORCED.startswith(text_of(token_ids))


def test_stop_tokens_and_min_tokens_are_honoured(engine: Engine) -> None:
    stop = TOKENIZER.encode("b")
    core = constrained(engine, "s", {"regex": "(ab){9}"})
    (token_ids,) = run(engine, replace(core, stop_token_ids=tuple(stop)))
    assert token_ids == TOKENIZER.encode("ab")
    assert engine[1].outputs["s"][-1].stop_token_id == stop[0]
    # A stop token is sampled even where it is forced, and what is forced behind it is not said.
    core = constrained(engine, "f", {"regex": f"[ab]cd{FORCED}"}, seed=3)
    (token_ids,) = run(engine, replace(core, stop_token_ids=tuple(TOKENIZER.encode("ab"))))
    assert len(token_ids) == 1
    core = replace(core, request_id="d", stop_token_ids=tuple(TOKENIZER.encode("d")))
    assert text_of(run(engine, core)[0])[1:] == "cd"
    (token_ids,) = run(engine, constrained(engine, "n", {"regex": "[a-z]*"}, min_tokens=9, temperature=2.0))
    assert len(token_ids) >= 9


def test_without_end_tokens_the_grammar_ends_the_answer(engine: Engine) -> None:
    for request_id, regex in (("i", "[a-c]{5}"), ("f", FORCED), ("o", "ab?")):
        (token_ids,) = run(engine, constrained(engine, request_id, {"regex": regex}, ignore_eos=True))
        assert re.fullmatch(regex, text_of(token_ids))
        assert engine[1].outputs[request_id][-1].finish_reason == "stop"
        assert ASCII_EOS not in token_ids
    (token_ids,) = run(engine, constrained(engine, "e", {"regex": "[a-c]*"}, ignore_eos=True, max_tokens=20))
    assert len(token_ids) == 20


def test_masks_are_combined(engine: Engine) -> None:
    allowed = [*TOKENIZER.encode("abc"), ASCII_EOS]
    core = constrained(engine, "a", {"regex": "[b-z]{6}"}, allowed_token_ids=allowed)
    (token_ids,) = run(engine, core)
    assert re.fullmatch("[bc]{6}", text_of(token_ids))
    banned = replace(core, request_id="b", bad_word_ids=((TOKENIZER.encode("b")[0],),))
    assert text_of(run(engine, banned)[0]) == "cccccc"
    pair = constrained(engine, "w", {"regex": "[ab]{8}"})
    b = TOKENIZER.encode("b")[0]
    (token_ids,) = run(engine, replace(pair, bad_word_ids=((b, b),)))
    assert re.fullmatch("(?!.*bb)[ab]{8}", text_of(token_ids))


def test_what_leaves_nothing_fails_alone(engine: Engine, dense: DenseModel) -> None:
    plain = request("plain", [5, 6, 7], max_tokens=20)
    engine[0].submit([plain])
    x = TOKENIZER.encode("x")
    assert "at odds" in failure(engine, constrained(engine, "a", {"choice": ["yes"]}, allowed_token_ids=x))
    assert "at odds" in failure(engine, constrained(engine, "m", {"choice": ["yes"]}, min_tokens=9))
    assert "at odds" in failure(engine, constrained(engine, "i", {"regex": ""}, ignore_eos=True))
    late = constrained(engine, "l", {"regex": "[a-c]xy"})
    assert "at odds" in failure(engine, replace(late, bad_word_ids=((x[0],),)))
    engine[1].wait("plain")
    assert engine[1].tokens("plain") == dense.greedy([5, 6, 7], 20)


def test_a_grammar_that_fails_on_the_way_fails_alone(engine: Engine, dense: DenseModel) -> None:
    chain = "\n".join(f'r{i}: "x"? r{i + 1} "y"*' for i in range(1500))
    grammar = f'start: /[a-c]{{9}}/ r0\n{chain}\nr1500: "z"'  # too much to keep in mind once it gets there
    good = constrained(engine, "good", {"json": PERSON, "disable_any_whitespace": True})
    (wanted,) = run(engine, good)
    engine[1].outputs.clear()
    bad = constrained(engine, "bad", {"grammar": grammar})
    answers = run(engine, good, bad, request("plain", [9, 8], max_tokens=20))
    assert answers[0] == wanted
    assert answers[2] == dense.greedy([9, 8], 20)
    assert "cannot be followed any further" in str(engine[1].outputs["bad"][-1].error)


def test_a_grammar_is_compiled_before_its_request_starts(engine: Engine) -> None:
    fresh = {"regex": "[a-c]{4}fresh"}
    (token_ids,) = run(engine, constrained(engine, "f", fresh))
    assert re.fullmatch(fresh["regex"], text_of(token_ids))
    assert "unclosed" in failure(engine, constrained(engine, "b", {"regex": "[a"}))


def test_a_compiler_that_breaks_fails_one_request(
    engine: Engine, dense: DenseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise MemoryError("no room")

    core = constrained(engine, "b", {"regex": "[a-c]{4}broken"})
    monkeypatch.setattr(compiler, "_compile", broken)
    told, _ = run(engine, request("plain", [5, 6, 7], max_tokens=20), core)
    assert told == dense.greedy([5, 6, 7], 20)
    assert engine[1].outputs["b"][-1].error == "MemoryError: no room"


def test_a_request_can_be_aborted_while_its_grammar_is_compiled(engine: Engine) -> None:
    client, collector, grammars = engine
    held = constrained(engine, "held", {"regex": "[a-c]{4}held"})
    gate = threading.Event()
    for _ in range(2):
        grammars._workers.submit(gate.wait)
    client.submit([held])
    client.abort(["held"])
    gate.set()
    run(engine, constrained(engine, "next", {"regex": "[a-c]{4}held"}))
    assert "held" not in collector.outputs


def test_the_python_api(cache_dir: str, grammars: GrammarCompiler) -> None:
    defaults = GenerationDefaults(eos_token_ids=(ASCII_EOS,))
    parts = EngineParts(build_constrained(cache_dir, grammars), TOKENIZER, defaults, grammars)
    with LLM.from_parts(parts, seed=3) as llm:
        constraint = StructuredOutputsParams(regex=f"[ab]{{3}} {FORCED} [a-z]{{2,5}}")
        params = SamplingParams(max_tokens=60, n=3, structured_outputs=constraint)
        (output,) = llm.generate(["a"], params, use_tqdm=False)
        assert [answer.finish_reason for answer in output.outputs] == ["stop"] * 3
        assert all(re.fullmatch(constraint.regex or "", answer.text) for answer in output.outputs)
        assert len({answer.text for answer in output.outputs}) > 1
        params = SamplingParams(max_tokens=60, structured_outputs=constraint, ignore_eos=True)
        (output,) = llm.generate(["a"], params, use_tqdm=False)
        assert re.fullmatch(constraint.regex or "", output.outputs[0].text)
        # A stop string within what is forced at once.
        params = SamplingParams(max_tokens=60, stop=["is y"], structured_outputs=constraint)
        (output,) = llm.generate(["a"], params, use_tqdm=False)
        assert re.fullmatch("[ab]{3} the name ", output.outputs[0].text)
        assert output.outputs[0].stop_reason == "is y"
        with pytest.raises(RequestError, match="unclosed") as caught:
            llm.generate("a", SamplingParams(structured_outputs=StructuredOutputsParams(regex="[")))
        assert caught.value.param == "structured_outputs"
        at_odds = SamplingParams(structured_outputs=constraint, bad_words=["a", "b"])
        with pytest.raises(RequestError, match="at odds"):
            llm.generate("a", at_odds, use_tqdm=False)
