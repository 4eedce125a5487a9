"""Streams over a real connection, read by the openai client and byte by byte."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

from tests.scripted import drawing
from tests.server.openai_client import openai_client
from tests.server.serving import PARIS, QUESTION, Serving, http_client, listening, read_events, say, serving


async def test_chat_through_the_openai_client():
    with serving(say("Grüße 🎉!")) as served:
        async with listening(served) as url, openai_client(url) as client:
            plain = await client.chat.completions.create(model="scripted", messages=QUESTION)
            stream = await client.chat.completions.create(
                model="scripted",
                messages=QUESTION,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
    assert plain.choices[0].message.content == "Grüße 🎉!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Grüße 🎉!"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_completions_and_models_through_the_openai_client():
    with serving() as served:
        async with listening(served) as url, openai_client(url) as client:
            models = [model.id async for model in client.models.list()]
            assert models == ["scripted"]
            assert (await client.models.retrieve("scripted")).id == "scripted"
            answer = await client.completions.create(model="scripted", prompt="a", max_tokens=40, logprobs=1)
            stream = await client.completions.create(model="scripted", prompt="a", max_tokens=40, stream=True)
            streamed = "".join([chunk.choices[0].text async for chunk in stream])
            assert answer.choices[0].text == streamed == PARIS
            assert answer._request_id is not None
            with pytest.raises(openai.NotFoundError) as missing:
                await client.completions.create(model="other", prompt="a")
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await client.completions.create(model="scripted", prompt="a", temperature=3)
            assert bad.value.param == "temperature"


async def collect(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    async with http_client(url) as client:
        response = await client.post(path, json=body)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-length" not in response.headers
        return read_events(response.content)


async def test_every_step_is_sent_when_it_happens():
    with serving(say("abc"), engine={"stalled": True}) as served:
        async with listening(served) as url, http_client(url) as client:
            body = {"prompt": "x", "stream": True}
            request = client.build_request("POST", "/v1/completions", json=body)
            sending = asyncio.create_task(client.send(request, stream=True))
            await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
            await asyncio.to_thread(served.engine.step)
            response = await sending
            lines = response.aiter_lines()
            assert '"text":"a"' in await anext(lines)
            await anext(lines)
            await asyncio.to_thread(served.engine.step)
            assert '"text":"b"' in await anext(lines)
            served.engine.resume()
            rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            await response.aclose()


async def test_order_of_a_chat_stream_with_everything():
    with serving(drawing([97, 98, 99], 3), engine={"stalled": True}) as served:
        async with listening(served) as url:
            body = {
                "messages": [*QUESTION, {"role": "assistant", "content": "So:"}],
                "n": 2,
                "seed": 1,
                "echo": True,
                "logprobs": True,
                "return_token_ids": True,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
            collecting = asyncio.create_task(collect(url, "/v1/chat/completions", body))
            await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 2)
            await asyncio.to_thread(served.engine.step, 3)
            served.engine.resume()
            chunks = await collecting
    opening, echoed, rest, last = chunks[:2], chunks[2:4], chunks[4:-1], chunks[-1]
    num_prompt = len(opening[0]["prompt_token_ids"])
    assert [c["choices"][0]["index"] for c in opening] == [0, 1]
    assert all(c["choices"][0]["delta"] == {"role": "assistant", "content": ""} for c in opening)
    assert ["prompt_token_ids" in c for c in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [c["choices"][0]["delta"] for c in echoed] == [{"content": "So:"}] * 2
    for index in (0, 1):
        own = [c for c in rest if c["choices"][0]["index"] == index]
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in own)
        token_ids = [i for c in own for i in c["choices"][0]["token_ids"]]
        entries = [entry for c in own for entry in c["choices"][0]["logprobs"]["content"]]
        assert len(text) == 3
        assert bytes(token_ids[:3]).decode() == text
        assert [entry["token"] for entry in entries[:3]] == list(text)
        assert own[-1]["choices"][0]["finish_reason"] == "stop"
        assert own[-1]["system_fingerprint"].startswith("jaxserve-")
        assert own[-1]["usage"]["completion_tokens"] == len(token_ids) == len(entries) == 4
        counts = [c["usage"]["completion_tokens"] for c in own]
        assert counts == sorted(counts)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + 8,
        "completion_tokens": 8,
    }


@pytest.mark.parametrize("options", [None, {"include_usage": False}])
async def test_no_usage_unless_asked_for(options: Any):
    with serving() as served:
        chunks = (await served.chat(stream=True, stream_options=options)).chunks
        assert all("usage" not in chunk for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_operator_may_have_usage_in_every_stream():
    with serving(enable_force_include_usage=True) as served:
        for answer in (await served.chat(stream=True), await served.complete(stream=True)):
            assert [chunk["choices"] for chunk in answer.chunks if "usage" in chunk] == [[]]


async def test_continuous_usage_alone():
    with serving() as served:
        for answer in (
            await served.chat(stream=True, stream_options={"continuous_usage_stats": True}),
            await served.complete(stream=True, stream_options={"continuous_usage_stats": True}),
        ):
            assert all("usage" in chunk for chunk in answer.chunks)
            assert all(chunk["choices"] for chunk in answer.chunks)


@pytest.mark.parametrize("script_text", ["Grüße, 世界! 🎉🚀 x", "a" * 50, "The end is near the end"])
@pytest.mark.parametrize("stop", [None, ["end"], ["世界", "zz"], ["🚀 y"]])
@pytest.mark.parametrize("max_tokens", [7, 13, 60])
async def test_joined_stream_is_the_whole_answer(script_text: str, stop: Any, max_tokens: int):
    with serving(say(script_text)) as served:
        fields = {"stop": stop, "max_tokens": max_tokens}
        whole = (await served.chat(**fields)).json["choices"][0]
        chunks = (await served.chat(stream=True, **fields)).chunks
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(p["delta"].get("content", "") for p in pieces) == whole["message"]["content"]
    assert pieces[-1]["finish_reason"] == whole["finish_reason"]
    assert pieces[-1].get("stop_reason") == whole.get("stop_reason")
    assert all(p["delta"].get("content") for p in pieces[1:-1])  # no empty chunks
    if max_tokens > len(script_text.encode()):
        assert "\ufffd" not in whole["message"]["content"]


async def stream_and_break(served: Serving, breaking: Any) -> httpx.Response:
    async with listening(served) as url, http_client(url) as client:
        body = {"prompt": "x", "stream": True, "max_tokens": 200}
        request = client.build_request("POST", "/v1/completions", json=body)
        sending = asyncio.create_task(client.send(request, stream=True))
        await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
        await asyncio.to_thread(served.engine.step)
        response = await sending
        breaking()
        await response.aread()
        return response


@pytest.mark.parametrize("kind", ["request", "engine"])
async def test_an_error_in_mid_stream_is_an_event(kind: str):
    with serving(say("a" * 100), engine={"stalled": True}) as served:

        def breaking() -> None:
            if kind == "engine":
                served.engine.die(RuntimeError("the device is lost"))
            else:
                served.engine.fail(served.engine.submitted[0].request_id, "no page left")
                served.engine.resume()

        response = await stream_and_break(served, breaking)
        assert response.status_code == 200
        *chunks, error = read_events(response.content)
        assert "".join(c["choices"][0]["text"] for c in chunks) == "a"
        assert set(error) == {"error"}
        assert error["error"]["type"] == (
            "ServiceUnavailableError" if kind == "engine" else "InternalServerError"
        )


async def test_a_failure_before_the_first_token_has_a_status():
    def script(request: Any) -> Any:
        raise ValueError("never mind")

    with serving(script) as served:
        for stream in (False, True):
            answer = await served.chat(stream=stream)
            assert answer.status == 500
            assert answer.error["message"] == "never mind"
