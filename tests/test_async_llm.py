"""AsyncLLM over the scripted engine: streams, merging, every way of letting go, death, drain, limits."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.async_llm import LONG_TEXT, AsyncLLM
from jaxserve.errors import (
    EngineDeadError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    ShuttingDownError,
)
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.outputs import RequestOutput
from jaxserve.request_stream import RequestStream
from jaxserve.sampling_params import OutputKind, SamplingParams
from tests.patience import PATIENCE
from tests.scripted import ScriptedClient, drawing, saying, scripted_info
from tests.tiny import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()
ENDLESS = scripted_info(max_model_len=10**9)
DEFAULTS = GenerationDefaults(eos_token_ids=(EOS,), sampling={"temperature": 0.25})
Open = Callable[..., tuple[AsyncLLM, ScriptedClient]]


@pytest.fixture
def open_llm() -> Iterator[Open]:
    """Make an AsyncLLM and its engine; both are stopped at the end."""
    opened: list[AsyncLLM] = []

    def open_one(script: Any = None, *, max_num_queued_reqs: int | None = None, **options: Any):
        client = ScriptedClient(script, **options) if script else ScriptedClient(**options)
        llm = AsyncLLM(client, TOKENIZER, DEFAULTS, max_num_queued_reqs=max_num_queued_reqs)
        opened.append(llm)
        return llm, client

    yield open_one
    for llm in opened:
        llm.shutdown()


def params(kind: OutputKind = OutputKind.DELTA, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 64, "output_kind": kind, **fields})


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


async def reaches(client: ScriptedClient, condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(client.wait_until, condition)


class TestStreams:
    async def test_deltas_join_to_the_final_answer(self, open_llm: Open):
        llm, _ = open_llm(saying([*"Grüße, 世界".encode()]))
        deltas = await collect(llm.generate("hi", params()))
        (final,) = await collect(llm.generate("hi", params(OutputKind.FINAL_ONLY)))
        cumulative = await collect(llm.generate("hi", params(OutputKind.CUMULATIVE)))
        assert "".join(d.outputs[0].text for d in deltas) == "Grüße, 世界"
        assert final.outputs == cumulative[-1].outputs
        assert final.outputs[0].text == "Grüße, 世界"
        assert final.outputs[0].token_ids == [i for d in deltas for i in d.outputs[0].token_ids]
        assert (final.outputs[0].finish_reason, final.finished) == ("stop", True)
        assert (final.prompt, final.prompt_token_ids) == ("hi", [*b"hi"])

    @settings(
        max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    )
    @given(
        text=st.text(alphabet="abé🎉", max_size=12),
        tokens_per_step=st.integers(1, 5),
        n=st.integers(1, 3),
        stop=st.sampled_from([(), ("ab",), ("🎉", "bb")]),
        logprobs=st.sampled_from([None, 2]),
    )
    def test_every_kind_says_the_same(
        self,
        open_llm: Open,
        text: str,
        tokens_per_step: int,
        n: int,
        stop: tuple[str, ...],
        logprobs: int | None,
    ):
        async def ask(kind: OutputKind) -> list[RequestOutput]:
            return await collect(llm.generate("?", params(kind, n=n, stop=stop, logprobs=logprobs)))

        llm, _ = open_llm(saying([*text.encode()]), tokens_per_step=tokens_per_step)
        (final,) = asyncio.run(ask(OutputKind.FINAL_ONLY))
        assert asyncio.run(ask(OutputKind.CUMULATIVE))[-1].outputs == final.outputs
        deltas = asyncio.run(ask(OutputKind.DELTA))
        for answer in final.outputs:
            parts = [part for delta in deltas for part in delta.outputs if part.index == answer.index]
            assert "".join(part.text for part in parts) == answer.text
            assert [i for part in parts for i in part.token_ids] == answer.token_ids
            assert [entry for part in parts for entry in part.logprobs or []] == (answer.logprobs or [])
            assert (parts[-1].finish_reason, parts[-1].stop_reason) == (
                answer.finish_reason,
                answer.stop_reason,
            )

    async def test_outputs_that_wait_are_merged(self, open_llm: Open):
        llm, client = open_llm(saying([*b"abcdef"]), stalled=True)
        stream = llm.generate("hi", params(logprobs=0))
        await asyncio.to_thread(client.step, 4)
        first = await anext(stream)
        assert first.outputs[0].text == "abcd"
        assert len(first.outputs[0].logprobs or []) == 4
        client.resume()
        assert "".join([output.outputs[0].text async for output in stream]) == "ef"

    async def test_a_step_wakes_the_loop_once(self, open_llm: Open, monkeypatch: pytest.MonkeyPatch):
        llm, client = open_llm(saying([*b"xyz"]), stalled=True)
        streams = [llm.generate("hi", params()) for _ in range(5)]
        loop, calls = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: calls.append(args) or call(*args))
        client_step = asyncio.create_task(asyncio.to_thread(client.step, 1))
        outputs = [await anext(stream) for stream in streams]
        await client_step
        assert [output.outputs[0].text for output in outputs] == ["x"] * 5
        assert len([args for args in calls if args[0] == llm._deliver]) == 1

    async def test_stop_string_aborts_in_the_engine(self, open_llm: Open):
        llm, client = open_llm(saying([*b"one two three"]))
        stream = llm.generate("hi", params(OutputKind.FINAL_ONLY, stop=(" t",), ignore_eos=True), "r")
        (output,) = await collect(stream)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("one", " t")
        await reaches(client, lambda: client.aborted == ["r#0"])
        assert llm.num_in_flight == client.num_unfinished == 0

    async def test_seeds(self, open_llm: Open):
        llm, _ = open_llm(drawing([*b"abcdefgh"], 12))

        async def texts(**fields: Any) -> list[str]:
            (output,) = await collect(llm.generate("hi", params(OutputKind.FINAL_ONLY, **fields)))
            return [answer.text for answer in output.outputs]

        assert len(set(await texts(n=4))) == 4
        assert await texts(n=3, seed=7) == [(await texts(seed=7 + i))[0] for i in range(3)]
        assert len(set(await texts(n=3, temperature=0))) == 1

    async def test_long_text_is_tokenized_like_short_text(self, open_llm: Open):
        llm, _ = open_llm()
        text = "ab" * LONG_TEXT
        assert await llm.encode(text) == TOKENIZER.encode(text)
        assert await llm.encode("ab") == [*b"ab"]

    async def test_a_conversation(self, open_llm: Open):
        llm, client = open_llm()
        prompt = llm.render_chat([{"role": "user", "content": "Hi"}])
        assert prompt.text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        (output,) = await collect(llm.generate(prompt, params(OutputKind.FINAL_ONLY)))
        assert (
            client.submitted[0].prompt_token_ids == TOKENIZER.encode(prompt.text) == output.prompt_token_ids
        )
        assert output.prompt == prompt.text

    async def test_max_tokens_is_cut_to_the_context_and_told(self, open_llm: Open):
        llm, _ = open_llm(saying([*b"abc"]), info=scripted_info(max_model_len=10))
        stream = llm.generate("1234567", params(OutputKind.FINAL_ONLY, max_tokens=50, ignore_eos=True))
        assert stream.max_tokens == 3
        (output,) = await collect(stream)
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("abc", "length")

    def test_one_loop_after_another(self, open_llm: Open):
        llm, client = open_llm(saying([*b"ok"]), info=ENDLESS)

        async def leave_one_behind() -> RequestStream:
            return llm.generate("hi", params(ignore_eos=True, max_tokens=None), "left")

        async def ask() -> str:
            (output,) = await collect(llm.generate("hi", params(OutputKind.FINAL_ONLY)))
            return output.outputs[0].text

        client.stall()  # it could else end before its loop does
        left = asyncio.run(leave_one_behind())
        client.resume()
        assert asyncio.run(ask()) == "ok"
        assert client.aborted == ["left#0"]
        del left

    def test_outputs_on_their_way_while_one_loop_gives_way_to_another(self, open_llm: Open):
        llm, client = open_llm(saying([*b"ok"]), stalled=True)
        on_the_way, has_given_way = threading.Event(), threading.Event()

        def refuse(*_: object) -> None:
            on_the_way.set()
            has_given_way.wait()
            raise RuntimeError("Event loop is closed")

        async def leave_one_behind() -> RequestStream:
            asyncio.get_running_loop().call_soon_threadsafe = refuse  # type: ignore[method-assign]
            return llm.generate("hi", params(), "left")

        async def ask() -> str:
            stream = llm.generate("hi", params(OutputKind.FINAL_ONLY))
            has_given_way.set()
            (output,) = await collect(stream)
            return output.outputs[0].text

        left = asyncio.run(leave_one_behind())
        client.resume()
        on_the_way.wait()
        assert asyncio.run(ask()) == "ok"
        del left


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "fields", "param"),
        [
            ("", {}, "prompt"),
            ([5, 262], {}, "prompt"),
            ("x" * 300, {}, "prompt"),
            ("hi", {"logprobs": 21}, "logprobs"),
            ("hi", {"logit_bias": {999: 1.0}}, "logit_bias"),
        ],
    )
    async def test_nothing_wrong_reaches_the_engine(
        self, open_llm: Open, prompt: Any, fields: dict[str, Any], param: str
    ):
        llm, client = open_llm()
        with pytest.raises(RequestError) as caught:
            llm.generate(prompt, params(**fields))
        assert caught.value.param == param
        assert client.submitted == []
        assert llm.num_in_flight == 0

    async def test_an_id_in_use(self, open_llm: Open):
        llm, client = open_llm(stalled=True)
        first = llm.generate("hi", params(), "same")
        with pytest.raises(RequestError, match="same") as caught:
            llm.generate("hi", params(), "same")
        assert caught.value.param == "request_id"
        client.resume()
        assert (await collect(first))[-1].finished
        assert (await collect(llm.generate("hi", params(), "same")))[-1].finished

    async def test_a_full_queue(self, open_llm: Open):
        llm, client = open_llm(max_num_queued_reqs=2, info=scripted_info(max_num_seqs=3), stalled=True)
        streams = [llm.generate("hi", params()) for _ in range(5)]
        with pytest.raises(QueueFullError, match="max_num_queued_reqs is 2"):
            llm.generate("hi", params())
        client.resume()
        for stream in streams:
            assert (await collect(stream))[-1].finished
        assert (await collect(llm.generate("hi", params())))[-1].finished

    async def test_a_failed_request_fails_alone(self, open_llm: Open):
        llm, client = open_llm(saying([*b"ok"]), stalled=True)
        bad, good = llm.generate("hi", params(n=2), "bad"), llm.generate("hi", params(), "good")
        client.fail("bad-1#1", "out of luck")
        client.resume()
        with pytest.raises(RequestFailedError, match="out of luck"):
            await collect(bad)
        assert "".join(output.outputs[0].text for output in await collect(good)) == "ok"
        assert client.aborted == ["bad-0#0"]
        assert llm.num_in_flight == 0


class TestLettingGo:
    """Whoever no longer reads, by whatever way, frees what the engine held for them."""

    async def endless(self, open_llm: Open) -> tuple[AsyncLLM, ScriptedClient, RequestStream]:
        llm, client = open_llm(saying([*b"abc"]), info=ENDLESS)
        return llm, client, llm.generate("hi", params(max_tokens=None, ignore_eos=True, n=2), "r")

    async def is_gone(self, llm: AsyncLLM, client: ScriptedClient) -> None:
        await reaches(client, lambda: client.num_unfinished == 0)
        assert client.aborted == ["r-0#0", "r-1#1"]
        assert llm.num_in_flight == 0
        stats = llm.stats()
        assert stats.num_free_pages == stats.num_pages

    async def test_closing(self, open_llm: Open):
        llm, client, stream = await self.endless(open_llm)
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        await self.is_gone(llm, client)
        assert await collect(stream) == []

    async def test_closing_before_the_first_output(self, open_llm: Open):
        llm, client, stream = await self.endless(open_llm)
        stream.close()
        await self.is_gone(llm, client)

    async def test_leaving_the_context(self, open_llm: Open):
        llm, client, stream = await self.endless(open_llm)
        async with stream:
            await anext(stream)
        await self.is_gone(llm, client)

    async def test_cancelling_the_reader(self, open_llm: Open):
        llm, client, stream = await self.endless(open_llm)
        client.stall()
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)  # let it wait for an output
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        client.resume()
        await self.is_gone(llm, client)

    async def test_forgetting_the_stream(self, open_llm: Open):
        llm, client, stream = await self.endless(open_llm)
        await anext(stream)
        del stream
        gc.collect()
        await asyncio.sleep(0)  # the abort waits in the loop
        await self.is_gone(llm, client)

    async def test_aborting_by_id_ends_the_stream(self, open_llm: Open):
        llm, client, stream = await self.endless(open_llm)
        await anext(stream)
        assert llm.abort("r")
        outputs = await collect(stream)
        assert [answer.finish_reason for answer in outputs[-1].outputs] == ["abort", "abort"]
        assert outputs[-1].finished
        assert not llm.abort("r")
        await self.is_gone(llm, client)

    async def test_an_id_used_again_gets_nothing_of_the_old_answer(self, open_llm: Open):
        llm, client = open_llm(lambda request: request.prompt_token_ids * 4, stalled=True)
        old = llm.generate("old", params(n=2), "same")
        client.step(2)  # without awaiting: its outputs wait in the loop
        assert llm.abort("same")
        new = llm.generate("new", params(), "same")
        client.resume()
        assert "".join([output.outputs[0].text async for output in new]) == "newnewnewnew"
        assert [answer.text for answer in (await collect(old))[-1].outputs] == ["", ""]

    async def test_an_ended_request_is_not_aborted(self, open_llm: Open):
        llm, client = open_llm()
        stream = llm.generate("hi", params(), "r")
        assert (await collect(stream))[-1].finished
        stream.close()
        assert not llm.abort("r")
        assert client.aborted == []


class TestDeath:
    async def test_every_waiting_request_fails_at_once(self, open_llm: Open):
        llm, client = open_llm(stalled=True)
        readers = [asyncio.create_task(collect(llm.generate("hi", params()))) for _ in range(3)]
        await asyncio.sleep(0)
        client.die(RuntimeError("the device is lost"))
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
            assert "the device is lost" in str(result)
            assert isinstance(result.__cause__, RuntimeError)
        assert llm.is_dead
        assert str(llm.error) == "the device is lost"
        assert llm.num_in_flight == 0
        with pytest.raises(EngineDeadError, match="the device is lost"):
            llm.generate("hi", params())

    async def test_an_answer_that_was_complete_is_still_told(self, open_llm: Open):
        llm, client = open_llm(saying([*b"ok"]), tokens_per_step=9)
        stream = llm.generate("hi", params())
        await reaches(client, lambda: client.num_steps == 1)
        client.die()
        assert (await collect(stream))[-1].outputs[0].text == "ok"

    async def test_death_without_requests(self, open_llm: Open):
        llm, client = open_llm()
        client.die()
        client._thread.join()  # pyright: ignore[reportOptionalMemberAccess]  # it has been started
        assert llm.is_dead
        await llm.drain()


class TestDrain:
    async def test_what_runs_may_finish(self, open_llm: Open):
        llm, client = open_llm(saying([*b"ok"]), stalled=True)
        reader = asyncio.create_task(collect(llm.generate("hi", params(OutputKind.FINAL_ONLY))))
        draining = asyncio.create_task(llm.drain(timeout=PATIENCE))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDownError):
            llm.generate("hi", params())
        assert not draining.done()
        client.resume()
        await draining
        assert (await reader)[0].outputs[0].text == "ok"

    async def test_the_rest_is_aborted_in_time(self, open_llm: Open):
        llm, client = open_llm(stalled=True)
        reader = asyncio.create_task(collect(llm.generate("hi", params(), "r")))
        await asyncio.sleep(0)
        await llm.drain(timeout=0.01)
        assert (await reader)[-1].outputs[0].finish_reason == "abort"
        assert client.aborted == ["r#0"]

    async def test_with_nothing_in_flight(self, open_llm: Open):
        llm, _ = open_llm()
        await llm.drain()
        assert llm.is_draining

    async def test_shutdown_fails_who_still_waits(self, open_llm: Open):
        llm, _ = open_llm(stalled=True)
        reader = asyncio.create_task(collect(llm.generate("hi", params())))
        await asyncio.sleep(0)
        llm.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await reader
        with pytest.raises(ShuttingDownError):
            llm.generate("hi", params())


async def test_the_face_of_the_engine(open_llm: Open):
    llm, client = open_llm()
    assert llm.info is client.info
    assert llm.tokenizer is TOKENIZER
    assert llm.default_sampling_params(top_k=2) == SamplingParams(temperature=0.25, top_k=2)
    assert llm.stats().num_running == 0
    assert await llm.reset_prefix_cache()
