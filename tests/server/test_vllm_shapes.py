"""Our answers beside recorded ones of vLLM: the same statuses, keys, order and reasons."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.recorded import NAMES, Recording, joined, load, replay
from tests.server.serving import Answer, serving

# What is null there and here.
NULLABLE = {"logprobs", "finish_reason", "refusal", "token_strs", "content"}

# Keys that vLLM fills and we leave out on purpose: nobody asked for them, or they mean nothing here.
UNASKED = {
    "comp-echo-logprobs": {"prompt_logprobs"},
    "comp-echo-logprobs-max-tokens-0": {"prompt_logprobs"},
    "comp-echo-stream": {"prompt_token_ids"},
    "comp-echo-logprobs-stream": {"prompt_token_ids"},
    "flag-prompt-tokens-details-again": {"created_cache_tokens"},
    "flag-request-id-header-echo": {"created_cache_tokens"},
    "flag-return-tokens-as-token-ids": {"created_cache_tokens"},
}

# Where vLLM's `param` names no field of the request, or another one.
BETTER_PARAMS = {
    "chat-top-logprobs-21": "top_logprobs",
    "err-body-list": "body",
    "err-content-type-text": "Content-Type",
    "noflag-tool-auto": "tool_choice",
}

APIKEY_FLAGS: dict[str, Any] = {
    "api_keys": ("sk-peer-test",),
    "enable_prompt_tokens_details": True,
    "return_tokens_as_token_ids": True,
}


async def ask(recording: Recording) -> Answer:
    script, body, _ = replay(recording)
    flags = APIKEY_FLAGS if recording.set == "apikey" else {}
    data = recording.raw_body if body is None else json.dumps(body)
    info = {"vocab_size": 49152, "max_model_len": 2048}
    with serving(script, info=info, served_model_names=("smollm2",), **flags) as served:
        return await served.request(recording.method, recording.path, data=data, headers=recording.headers)


@pytest.mark.parametrize("name", NAMES)
async def test_status(name: str):
    recording = load(name)
    answer = await ask(recording)
    assert answer.status == recording.status


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).status >= 400])
async def test_errors(name: str):
    recording = load(name)
    answer = await ask(recording)
    error = answer.error
    if recording.status == 401:
        assert error["type"] == "AuthenticationError"
        return
    theirs = recording.answer["error"]
    assert error["type"] == theirs["type"].replace("Bad Request", "BadRequestError")
    named = BETTER_PARAMS.get(name)
    if named is None and theirs["param"] is not None:
        named = theirs["param"].removeprefix("body.").split(".")[0]
    if named is not None:
        assert error["param"] == named
    assert error["param"] is not None
    assert error["message"].endswith((".", "?"))


@pytest.mark.parametrize(
    "name", [name for name in NAMES if load(name).status == 200 and load(name).chunks is None]
)
async def test_whole_answers(name: str):
    recording = load(name)
    answer = await ask(recording)
    assert_same_keys(recording.answer, answer.json, UNASKED.get(name, set()), name)
    _, _, expected = replay(recording)
    if expected:
        assert load_choices(answer.json) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).chunks is not None])
async def test_streams(name: str):
    recording = load(name)
    assert recording.chunks is not None
    answer = await ask(recording)
    chunks = answer.chunks
    script, body, expected = replay(recording)
    assert joined(chunks) == expected
    for their_shape, our_shape in zip(outline(recording.chunks), outline(chunks), strict=True):
        assert our_shape == their_shape
    theirs = keys_with_values(recording.chunks) - UNASKED.get(name, set())
    assert theirs <= keys_with_values(chunks)
    assert keys_with_values(chunks) - theirs <= {"refusal"}
    for chunk in chunks:  # no empty chunks
        for piece in chunk["choices"]:
            says = piece["delta"] if "delta" in piece else piece["text"]
            assert says or piece["finish_reason"], chunk
    whole = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
    with serving(
        script, info={"vocab_size": 49152, "max_model_len": 2048}, served_model_names=("smollm2",)
    ) as served:
        assert load_choices((await served.post(recording.path, whole)).json) == joined(chunks)


def load_choices(answer: Any) -> list[dict[str, Any]]:
    return [
        {
            "text": c["message"]["content"] if "message" in c else c["text"],
            "finish_reason": c["finish_reason"],
            "stop_reason": c.get("stop_reason"),
        }
        for c in answer["choices"]
    ]


def outline(chunks: list[Any]) -> list[Any]:
    """The chunks by kind, runs of text taken together, choices apart (their order is chance)."""
    lines: dict[int, list[Any]] = {}
    for chunk in chunks:
        if not chunk["choices"]:
            lines.setdefault(-1, []).append("usage")
        for piece in chunk["choices"]:
            kind = "role" if piece.get("delta", {}).get("role") else "text"
            line = lines.setdefault(piece["index"], [])
            if not line or line[-1] != kind:
                line.append(kind)
            if piece["finish_reason"] is not None:
                line.append(piece["finish_reason"])
    ends_with_usage = [-1 in lines and chunks[-1]["choices"] == []]
    # Text may come with the chunk that ends the choice, so its absence before means nothing.
    return [[step for step in lines[i] if step != "text"] for i in sorted(lines)] + ends_with_usage


def keys_with_values(value: Any) -> set[str]:
    """Names of all keys, at any depth, that hold something."""
    if isinstance(value, list):
        return set().union(*(keys_with_values(item) for item in value)) if value else set()
    if isinstance(value, dict):
        found = {key for key, item in value.items() if item is not None}
        # Below these, keys are data.
        return found.union(*(keys_with_values(v) for k, v in value.items() if k != "top_logprobs"))
    return set()


def assert_same_keys(theirs: Any, ours: Any, unasked: set[str], where: str) -> None:
    """Every key that holds something there is here, with the same type; nothing else is."""
    if isinstance(theirs, list) and isinstance(ours, list):
        for their_item, our_item in zip(theirs, ours, strict=False):
            assert_same_keys(their_item, our_item, unasked, where + "[]")
        return
    if not isinstance(theirs, dict):
        if theirs is not None:
            number = (int, float)
            assert isinstance(ours, number if isinstance(theirs, number) else type(theirs)), where
        return
    assert isinstance(ours, dict), where
    if where.endswith(("top_logprobs[]", "prompt_logprobs[]")) and "token" not in theirs:
        return  # keys are tokens
    full = {key for key, value in theirs.items() if value is not None} - unasked
    assert full <= set(ours), f"{where}: {full - set(ours)} missing"
    extra = set(ours) - full
    for key in extra:
        assert key in NULLABLE, f"{where}.{key} is not there in vLLM's answer"
        assert ours[key] is None, f"{where}.{key} is null in vLLM's answer"
    for key in full:
        assert_same_keys(theirs[key], ours[key], unasked, f"{where}.{key}")
