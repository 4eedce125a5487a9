"""LLM over the scripted engine: order, shapes of input, chat, errors, notebooks, Ctrl-C."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxserve.assembly import EngineParts
from jaxserve.config import EngineConfig
from jaxserve.engine.protocol import CoreRequest
from jaxserve.engine_options import engine_config
from jaxserve.errors import ConfigError, ContextLengthError, EngineDeadError, RequestError, RequestFailedError
from jaxserve.llm import LLM
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.sampling_params import OutputKind, SamplingParams
from tests.scripted import ScriptedClient, drawing, saying, scripted_info
from tests.tiny import EOS, byte_tokenizer

DEFAULTS = GenerationDefaults(eos_token_ids=(EOS,), sampling={"temperature": 0.25, "max_tokens": 5})
GREEDY = SamplingParams(temperature=0, max_tokens=32)
Open = Callable[..., tuple[LLM, ScriptedClient]]


@pytest.fixture
def open_llm() -> Iterator[Open]:
    """Make an LLM and its engine; both are stopped at the end."""
    opened: list[LLM] = []

    def open_one(
        *script: Any, chat: bool = True, seed: int | None = None, **options: Any
    ) -> tuple[LLM, ScriptedClient]:
        client = ScriptedClient(*script, **options)
        tokenizer = byte_tokenizer() if chat else byte_tokenizer(chat_template=None)
        llm = LLM.from_parts(EngineParts(client, tokenizer, DEFAULTS), seed=seed)
        opened.append(llm)
        return llm, client

    yield open_one
    for llm in opened:
        llm.shutdown()


class TestGenerate:
    def test_answers_come_in_the_order_of_the_prompts(self, open_llm: Open):
        llm, _ = open_llm(info=scripted_info(max_num_seqs=3))
        prompts = ["a" * (1 + i * 7 % 11) for i in range(11)]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.prompt for output in outputs] == prompts
        assert [output.outputs[0].text for output in outputs] == prompts  # the engine echoes
        assert all(output.finished for output in outputs)

    @pytest.mark.parametrize(
        "prompt", ["hi", [*b"hi"], {"prompt": "hi"}, {"prompt_token_ids": [*b"hi"]}, ["hi"], [[*b"hi"]]]
    )
    def test_prompts_of_every_shape(self, open_llm: Open, prompt: Any):
        llm, _ = open_llm()
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert (output.outputs[0].text, output.prompt_token_ids) == ("hi", [*b"hi"])

    def test_no_prompts(self, open_llm: Open):
        assert open_llm()[0].generate([], GREEDY) == []

    def test_params_of_each(self, open_llm: Open):
        llm, _ = open_llm()
        params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, n=2)]
        one, two = llm.generate(["abc", "xyz"], params, use_tqdm=False)
        assert [answer.text for answer in one.outputs] == ["a"]
        assert [answer.text for answer in two.outputs] == ["xy", "xy"]
        with pytest.raises(RequestError, match="2 for 1 prompts") as caught:
            llm.generate(["abc"], params)
        assert caught.value.param == "sampling_params"

    def test_arguments_as_vllms_callers_give_them(self, open_llm: Open):
        llm, client = open_llm()
        outputs = llm.generate(["abc", "xyz"], GREEDY, False, None, [5, -1])
        assert [output.outputs[0].text for output in outputs] == ["abc", "xyz"]
        assert [request.priority for request in client.submitted] == [5, -1]
        with pytest.raises(RequestError, match="priority must have a number for each of 2 prompts, got 1"):
            llm.generate(["abc", "xyz"], GREEDY, priority=[1])
        with pytest.raises(RequestError, match="lora_request is not supported"):
            llm.generate(["abc", "xyz"], GREEDY, lora_request="x")
        with pytest.raises(RequestError, match="merge the adapter"):
            llm.chat([{"role": "user", "content": "Hi"}], GREEDY, lora_request="x")

    def test_the_models_own_defaults(self, open_llm: Open):
        llm, client = open_llm(saying([*b"abcdefgh"]))
        (output,) = llm.generate("hi", use_tqdm=False)
        assert output.outputs[0].text == "abcde"
        assert client.submitted[0].params.temperature == 0.25
        assert llm.get_default_sampling_params(top_k=3).top_k == 3

    def test_the_kind_of_a_stream_does_not_matter(self, open_llm: Open):
        llm, _ = open_llm()
        params = SamplingParams(max_tokens=9, output_kind=OutputKind.DELTA)
        (output,) = llm.generate("hello", params, use_tqdm=False)
        assert output.outputs[0].text == "hello"

    def test_stop_string(self, open_llm: Open):
        llm, client = open_llm(saying([*b"one two"]))
        (output,) = llm.generate("hi", SamplingParams(stop=(" t",), max_tokens=50), use_tqdm=False)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("one", " t")
        client.wait_until(lambda: client.num_unfinished == 0)

    def test_seeded_engine_repeats_itself(self, open_llm: Open):
        def texts(seed: int | None) -> list[str]:
            llm, _ = open_llm(drawing([*b"abcdefgh"], 20), seed=seed)
            return [o.outputs[0].text for o in llm.generate(["x", "x"], SamplingParams(max_tokens=20))]

        assert texts(1) == texts(1)
        assert len({*texts(1), *texts(2), *texts(None)}) == 6

    def test_progress_counts_requests_and_tokens(self, open_llm: Open, capsys: pytest.CaptureFixture[str]):
        llm, _ = open_llm()
        llm.generate(["a", "b", "c"], GREEDY)
        shown = capsys.readouterr().err
        assert "3/3" in shown
        assert "tok/s" in shown
        llm.generate(["a"], GREEDY, use_tqdm=False)
        assert capsys.readouterr().err == ""

    def test_from_several_threads(self, open_llm: Open):
        llm, _ = open_llm()
        answers: dict[str, str] = {}

        def ask(prompt: str) -> None:
            answers[prompt] = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("one", "two", "three")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {"one": "one", "two": "two", "three": "three"}

    async def test_within_a_running_event_loop(self, open_llm: Open):
        assert asyncio.get_running_loop().is_running()
        assert open_llm()[0].generate("hi", GREEDY, use_tqdm=False)[0].outputs[0].text == "hi"

    def test_a_prompt_far_too_long_is_refused_unread(self, open_llm: Open):
        llm, client = open_llm()
        digits = "1" * 100_000
        with pytest.raises(
            ContextLengthError, match=r"prompts\[1\]: This .* 256 tokens.* at least 256"
        ) as caught:
            llm.generate(["hi", digits], GREEDY)
        assert caught.value.param == "prompt"
        with pytest.raises(ContextLengthError, match="at least 256 tokens") as caught:
            llm.chat([{"role": "user", "content": digits}], GREEDY)
        assert caught.value.param == "messages"
        assert client.submitted == []
        assert len(llm.render_chat([{"role": "user", "content": digits}]).token_ids) > 100_000


class TestChat:
    HELLO = [{"role": "user", "content": "Hi"}]  # noqa: RUF012  # read only

    def test_one_conversation_or_several(self, open_llm: Open):
        llm, client = open_llm(saying([*b"Hello!"]))
        (one,) = llm.chat(self.HELLO, GREEDY, use_tqdm=False)
        two = llm.chat([self.HELLO, self.HELLO], GREEDY, use_tqdm=False)
        assert [output.outputs[0].text for output in (one, *two)] == ["Hello!"] * 3
        text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert one.prompt == two[1].prompt == text
        assert client.submitted[0].prompt_token_ids == llm.get_tokenizer().encode(text)

    def test_the_templates_arguments(self, open_llm: Open):
        llm, _ = open_llm()
        template = "{{ messages[0].content }}|{{ mood }}|{{ add_generation_prompt }}|{{ tools | tojson }}"
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        (output,) = llm.chat(
            self.HELLO,
            GREEDY,
            use_tqdm=False,
            chat_template=template,
            add_generation_prompt=False,
            tools=[tool],
            chat_template_kwargs={"mood": "good"},
        )
        shown = '[{"type": "function", "function": {"name": "f", "description": null, "parameters": {}}}]'
        assert output.prompt == f"Hi|good|False|{shown}"

    def test_tools_that_the_template_does_not_show(self, open_llm: Open):
        llm, _ = open_llm()
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        for wants_tool_calls in (False, True):
            prompt = llm.render_chat(
                self.HELLO,
                chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
                tools=[tool],
                wants_tool_calls=wants_tool_calls,
            )
            assert prompt.text is not None
            assert ('"name": "f"' in prompt.text) == wants_tool_calls

    def test_content_format_and_documents(self, open_llm: Open):
        llm, _ = open_llm()
        template = "{{ messages[0].content }}|{{ documents[0].text }}"
        asked = {"chat_template": template, "documents": [{"text": "D"}]}
        assert llm.render_chat(self.HELLO, **asked).text == "Hi|D"
        parts = llm.render_chat(self.HELLO, **asked, chat_template_content_format="openai")
        assert parts.text == "[{'type': 'text', 'text': 'Hi'}]|D"
        with pytest.raises(RequestError, match="must be auto, string or openai") as caught:
            llm.chat(self.HELLO, GREEDY, chat_template_content_format="x")  # pyright: ignore[reportArgumentType]  # wrong on purpose
        assert caught.value.param == "chat_template_content_format"

    def test_counters_and_an_empty_prefix_cache(self, open_llm: Open):
        llm, client = open_llm()
        llm.chat(self.HELLO, GREEDY, use_tqdm=False)
        client.wait_until(lambda: client.num_unfinished == 0)
        assert llm.stats().num_running == 0
        assert llm.stats().num_steps > 0
        assert llm.reset_prefix_cache()

    def test_going_on_with_the_last_message(self, open_llm: Open):
        llm, _ = open_llm()
        conversation = [*self.HELLO, {"role": "assistant", "content": "Well,"}]
        (output,) = llm.chat(
            conversation, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True
        )
        assert output.prompt == llm.render_chat(conversation, continue_final_message=True).text
        assert output.prompt is not None
        assert output.prompt.endswith("<|im_start|>assistant\nWell,")

    def test_without_a_template(self, open_llm: Open):
        llm, _ = open_llm(chat=False)
        with pytest.raises(RequestError, match="the model has none") as caught:
            llm.chat(self.HELLO, GREEDY)
        assert caught.value.param == "chat_template"

    def test_a_wrong_conversation_is_named(self, open_llm: Open):
        llm, client = open_llm()
        with pytest.raises(RequestError, match=r"conversations\[1\]"):
            llm.chat([self.HELLO, [{"role": 7}]], GREEDY)  # pyright: ignore[reportArgumentType]  # wrong on purpose
        assert client.submitted == []


class TestErrors:
    def test_nothing_runs_when_one_prompt_is_wrong(self, open_llm: Open):
        llm, client = open_llm()
        with pytest.raises(RequestError, match=r"prompts\[1\]: .*empty") as caught:
            llm.generate(["fine", ""], GREEDY)
        assert caught.value.param == "prompt"
        assert client.submitted == []
        with pytest.raises(RequestError, match="got int"):
            llm.generate(7, GREEDY)  # pyright: ignore[reportArgumentType]  # wrong on purpose

    def test_a_failed_request(self, open_llm: Open):
        def script(request: CoreRequest) -> list[int]:
            if request.prompt_token_ids == [*b"bad"]:
                raise ValueError("out of luck")
            return [*b"fine"]

        llm, client = open_llm(script)
        with pytest.raises(RequestFailedError, match="out of luck"):
            llm.generate(["good", "bad", "good"], SamplingParams(ignore_eos=True, max_tokens=None))
        client.wait_until(lambda: client.num_unfinished == 0)
        assert llm.generate("good", GREEDY)[0].outputs[0].text == "fine"

    def test_death(self, open_llm: Open):
        llm, client = open_llm(stalled=True)
        threading.Thread(
            target=lambda: (
                client.wait_until(lambda: bool(client.submitted)),
                client.die(OSError("no device")),
            )
        ).start()
        with pytest.raises(EngineDeadError, match="no device"):
            llm.generate("hi", GREEDY)
        with pytest.raises(EngineDeadError):
            llm.generate("hi", GREEDY)

    def test_shutdown_while_another_thread_waits(self, open_llm: Open):
        llm, client = open_llm(stalled=True)
        threading.Thread(
            target=lambda: (client.wait_until(lambda: bool(client.submitted)), llm.shutdown())
        ).start()
        with pytest.raises(EngineDeadError, match="shut down"):
            llm.generate("hi", GREEDY)

    def test_interrupt_aborts_what_runs(self, open_llm: Open):
        llm, client = open_llm(saying([*b"abc"]), info=scripted_info(max_model_len=10**9))
        params = SamplingParams(max_tokens=None, ignore_eos=True)
        threading.Thread(
            target=lambda: (
                client.wait_until(lambda: client.num_steps > 2),
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT),
            )
        ).start()
        gc.disable()  # an interrupt that comes in a collection is lost in whom that calls back, as JAX
        try:
            with pytest.raises(KeyboardInterrupt):
                llm.generate(["one", "two"], params)
        finally:
            gc.enable()
        client.wait_until(lambda: client.num_unfinished == 0)
        assert len(client.aborted) == 2
        assert llm.generate("hi", GREEDY)[0].outputs[0].text.startswith("abc")


class TestLife:
    def test_leaving_the_context_stops_the_engine(self):
        client = ScriptedClient()
        with LLM.from_parts(EngineParts(client, byte_tokenizer(), DEFAULTS)) as llm:
            assert llm.info is client.info
        with pytest.raises(EngineDeadError):
            client.submit([])

    def test_an_llm_that_nobody_holds_stops_its_engine(self):
        client = ScriptedClient()
        llm = LLM.from_parts(EngineParts(client, byte_tokenizer(), DEFAULTS))
        llm.generate("hi", GREEDY, use_tqdm=False)
        del llm
        gc.collect()
        with pytest.raises(EngineDeadError):
            client.submit([])

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"max_num_seq": 3}, "max_num_seq=3: .* did you mean max_num_seqs?"),
            ({"zzz": 1}, "zzz=1: unknown .* there are tokenizer, .*max_model_len"),
            ({"page_size": 3}, "page_size=3: use a power of two"),
            ({"block_size": "16"}, "page_size='16': use a power of two"),
            ({"max_model_len": "8k"}, "max_model_len='8k': must be a whole number, at least 1"),
            ({"quantization": "awq"}, "quantization='awq': not supported; weights run in dtype"),
            ({"enable_lora": True}, "enable_lora=True: not supported; LoRA"),
        ],
    )
    def test_wrong_options_are_refused_before_anything_loads(self, options: dict[str, Any], says: str):
        with pytest.raises(ConfigError, match=says):
            LLM("no-such-model", **options)

    def test_options_become_the_engines_config(self):
        config = engine_config("m", {"max_model_len": 9, "dtype": "float32"})
        assert (config.model, config.max_model_len, config.dtype) == ("m", 9, "float32")

    def test_options_in_vllms_words(self, caplog: pytest.LogCaptureFixture):
        said = {"block_size": 32, "kv_cache_memory_bytes": 5, "dtype": "half", "quantization": None}
        said |= {"limit_mm_per_prompt": None, "enable_lora": False, "pipeline_parallel_size": 1}
        config = engine_config("m", {**said, "swap_space": 4, "enable_chunked_prefill": False})
        assert config == EngineConfig("m", page_size=32, kv_cache_memory=5, dtype="float16")
        assert [record.getMessage().split("; ")[0] for record in caplog.records] == [
            "swap_space=4: has no effect",
            "enable_chunked_prefill=False: has no effect",
        ]

    @pytest.mark.parametrize(
        ("said", "is_then"),
        [("auto", None), (None, None), ("float", "float32"), ("torch.bfloat16", "bfloat16")],
    )
    def test_dtypes_have_several_names(self, said: Any, is_then: str | None):
        assert engine_config("m", {"dtype": said}).dtype == is_then


def test_front_ends_cost_neither_jax_nor_quart():
    code = (
        "import sys, jaxserve.async_llm, jaxserve.llm\n"
        "print(*[name for name in ('jax', 'flax', 'quart', 'uvicorn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
