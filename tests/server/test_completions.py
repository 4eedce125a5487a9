"""Plain completions: prompts of every shape, echo, logprobs, several answers."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import jaxserve.request_state as request_state_module
import jaxserve.server.completion_choices as choices_module
from tests.scripted import drawing, echo
from tests.server.serving import PARIS, say, serving
from tests.tiny import BOS


async def test_a_plain_answer_holds_what_openai_requires_and_no_more():
    with serving() as served:
        body = (await served.complete()).json
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("jaxserve-")
    assert body == {
        "object": "text_completion",
        "model": "scripted",
        "choices": [{"index": 0, "text": PARIS, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "total_tokens": 39, "completion_tokens": 32},
    }


@pytest.mark.parametrize("sampling", [{}, {"max_tokens": 16}, {"max_tokens": 20}])
async def test_sixteen_tokens_unless_told_otherwise(sampling: dict[str, Any]):
    with serving(sampling=sampling) as served:
        body = (await served.post("/v1/completions", {"prompt": "Say it:"})).json
        assert body["choices"][0]["text"] == PARIS[:16]
        assert body["choices"][0]["finish_reason"] == "length"
        null = (await served.complete(max_tokens=None)).json["choices"][0]
        assert null["text"] == PARIS[: sampling.get("max_tokens")]


async def test_the_operators_limit():
    with serving(sampling={"max_tokens": 10}, max_tokens_limit=10) as served:
        for fields in ({}, {"max_tokens": None}, {"max_tokens": 10}):
            answer = await served.post("/v1/completions", {"prompt": "Say it:", **fields})
            assert answer.json["choices"][0]["text"] == PARIS[:10]
            assert "x-max-tokens-reduced" not in answer.headers
        cut = await served.complete(max_tokens=20, min_tokens=15)
        assert cut.json["choices"][0]["text"] == PARIS[:10]
        assert cut.headers["x-max-tokens-reduced"] == "10"
        chat = await served.chat(max_tokens=None, max_completion_tokens=11)
        assert chat.json["choices"][0]["message"]["content"] == PARIS[:10]
        assert chat.headers["x-max-tokens-reduced"] == "10"
        assert (await served.complete(max_tokens=4)).json["choices"][0]["text"] == PARIS[:4]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_of_every_shape(prompt: Any, texts: list[str], stream: bool):
    with serving(echo) as served:
        answer = await served.complete(prompt=prompt, stream=stream)
        pieces = (
            [c for chunk in answer.chunks for c in chunk["choices"]] if stream else answer.json["choices"]
        )
        said = dict.fromkeys(range(len(texts)), "")
        for piece in pieces:
            said[piece["index"]] += piece["text"]
        assert list(said.values()) == texts


async def test_choices_of_several_prompts_with_n():
    with serving(drawing([97, 98], 4)) as served:
        body = (await served.complete(prompt=["x", "yy"], n=2, seed=3)).json
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 23, "completion_tokens": 20}
        texts = [choice["text"] for choice in body["choices"]]
        assert texts[:2] == texts[2:]  # the same seeds
        streamed = (await served.complete(prompt=["x", "yy"], n=2, seed=3, stream=True)).chunks
        joined = [""] * 4
        for chunk in streamed:
            for piece in chunk["choices"]:
                joined[piece["index"]] += piece["text"]
        assert joined == texts


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs(stream: bool):
    with serving(say("cd")) as served:
        answer = await served.complete(
            prompt="ab", echo=True, logprobs=2, max_tokens=2, n=2, temperature=0, stream=stream
        )
        pieces = (
            [c for chunk in answer.chunks for c in chunk["choices"]] if stream else answer.json["choices"]
        )
        for index in (0, 1):
            own = [piece for piece in pieces if piece["index"] == index]
            assert "".join(piece["text"] for piece in own) == "abcd"
            assert own[-1]["finish_reason"] == "length"
            tokens, offsets, values, tops = (
                [item for piece in own for item in piece["logprobs"][key]]
                for key in ("tokens", "text_offset", "token_logprobs", "top_logprobs")
            )
            assert tokens == ["a", "b", "c", "d"]
            assert offsets == [0, 1, 2, 3]
            assert values == [None, -0.5, -1.0, -0.5]
            assert tops[0] is None
            assert [len(top) for top in tops[1:]] == [2, 2, 2]
            assert all("prompt_logprobs" not in piece for piece in own)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("module", "name"),
    [(request_state_module, "prompt_logprobs"), (choices_module, "completion_logprobs")],
    ids=["texts", "json"],
)
async def test_others_are_answered_while_a_long_prompt_is_told(
    module: Any, name: str, stream: bool, monkeypatch: pytest.MonkeyPatch
):
    begun, go_on = threading.Event(), threading.Event()
    honest = getattr(module, name)

    def slow(*arguments: Any, **named: Any) -> Any:
        begun.set()
        assert go_on.wait(10)  # as on the event loop it would not
        return honest(*arguments, **named)

    with serving(say("cd")) as served:

        async def echoed(prompt: str) -> Any:
            answer = await served.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=2, stream=stream)
            return answer.chunks[0] if stream else answer.json

        short = (await echoed("ab"))["choices"][0]["logprobs"]
        monkeypatch.setattr(module, name, slow)
        telling = asyncio.create_task(echoed("ab" * 100))
        await asyncio.to_thread(begun.wait)
        assert (await served.complete()).status == 200
        go_on.set()
        long = (await telling)["choices"][0]["logprobs"]
    assert [long[key][:2] for key in long] == [short[key][:2] for key in short]
    assert {len(told) for told in long.values()} <= {201, 202}  # with the answer's first token, or both


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_alone(stream: bool):
    """max_tokens 0: the prompt and its log-probabilities, and no answer at all."""
    with serving(say("cd")) as served:
        answer = await served.complete(
            prompt=[[97, 98], [97, BOS]],
            echo=True,
            max_tokens=0,
            logprobs=1,
            return_token_ids=True,
            stream=stream,
        )
        pieces = (
            [c for chunk in answer.chunks for c in chunk["choices"]] if stream else answer.json["choices"]
        )
        pieces.sort(key=lambda piece: piece["index"])
        assert [piece["text"] for piece in pieces] == ["ab", "a<|bos|>"]
        assert [piece["finish_reason"] for piece in pieces] == ["length", "length"]
        assert [piece["token_ids"] for piece in pieces] == [[], []]
        assert [piece["prompt_token_ids"] for piece in pieces] == [[97, 98], [97, BOS]]
        assert pieces[0]["logprobs"]["tokens"] == ["a", "b"]
        if not stream:
            assert answer.json["usage"]["completion_tokens"] == 0


async def test_logprobs_zero_names_the_sampled_token_alone():
    with serving(say("abc")) as served:
        logprobs = (await served.complete(logprobs=0, max_tokens=3)).json["choices"][0]["logprobs"]
        assert logprobs == {
            "text_offset": [0, 1, 2],
            "token_logprobs": [-1.0, -0.5, -1.0],
            "tokens": ["a", "b", "c"],
            "top_logprobs": [{"a": -1.0}, {"b": -0.5}, {"c": -1.0}],
        }


async def test_prompt_logprobs_keep_to_what_was_asked():
    with serving(say("cd")) as served:
        body = (await served.complete(prompt="abc", echo=True, logprobs=5, prompt_logprobs=1)).json
        entries = body["choices"][0]["prompt_logprobs"]
        assert entries[0] is None
        assert [len(entry) for entry in entries[1:]] == [1, 2]  # "b" is the most likely, "c" the second
        assert [len(top) for top in body["choices"][0]["logprobs"]["top_logprobs"][1:3]] == [5, 5]


async def test_special_tokens_around_the_prompt():
    with serving() as served:
        served.llm.tokenizer._put_bos_eos(True, False)
        await served.complete(prompt="ab")
        await served.complete(prompt="ab", add_special_tokens=False)
        assert [core.prompt_token_ids for core in served.engine.submitted] == [[BOS, 97, 98], [97, 98]]


async def test_long_prompts_are_tokenized_elsewhere():
    with serving(info={"max_model_len": 100_000}) as served:
        assert (await served.complete(prompt="x" * 50_000)).json["usage"]["prompt_tokens"] == 50_000


async def test_one_failing_prompt_fails_the_request_and_frees_the_others():
    def script(request: Any) -> Any:
        if request.prompt_token_ids == [98]:
            raise ValueError("no page for b")
        return [97] * 100

    with serving(script, engine={"stalled": True}) as served:
        served.engine.resume()
        answer = await served.complete(prompt=["a", "b"], max_tokens=200)
        assert answer.status == 500
        assert answer.error["message"] == "no page for b"
        served.engine.wait_until(lambda: served.engine.num_unfinished == 0)
        assert (await served.complete(prompt="a")).status == 200


async def test_harmless_values_of_unsupported_fields():
    with serving() as served:
        answer = await served.complete(
            suffix="", use_beam_search=False, length_penalty=1.0, response_format={"type": "text"}
        )
        assert answer.status == 200
        assert "x-ignored-params" not in answer.headers
