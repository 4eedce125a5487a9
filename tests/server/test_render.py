"""…/render: what a request becomes, without an answer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.marked_format import MarkedFormat
from tests.server.serving import QUESTION, Serving, serving
from tests.server.test_answer_parts import TOOLS, parted

CHAT = "/v1/chat/completions/render"


async def render(served: Serving, **fields: Any) -> Any:
    answer = await served.post(CHAT, {"messages": QUESTION, **fields})
    assert answer.status == 200, answer.data
    return answer.json


async def test_a_chat_request():
    with serving(sampling={"temperature": 0.25}) as served:
        rendered = await render(served, top_k=5, stop="x", cache_salt="mine", priority=2, stream=True)
        assert served.engine.submitted == []
        await served.chat(max_tokens=None)
        (core,) = served.engine.submitted
    assert rendered.pop("request_id").startswith("chatcmpl-")
    assert rendered.pop("token_ids") == core.prompt_token_ids
    assert rendered.pop("prompt") == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    params = rendered.pop("sampling_params")
    assert rendered == {"model": "scripted", "stream": True, "priority": 2, "cache_salt": "mine"}
    assert (params["temperature"], params["top_k"], params["stop"]) == (0.25, 5, ["x"])
    assert params["max_tokens"] == core.params.max_tokens == 512 - 49
    assert "seed" not in params


async def test_the_same_as_what_is_answered():
    fields: dict[str, Any] = {
        "max_tokens": 500,
        "seed": 3,
        "truncate_prompt_tokens": 20,
        "logit_bias": {"65": 1},
        "stop_token_ids": [9],
    }
    with serving() as served:
        rendered = await render(served, **fields)
        await served.chat(**fields)
        (core,) = served.engine.submitted
    assert rendered["token_ids"] == core.prompt_token_ids
    assert len(rendered["token_ids"]) == 20
    assert rendered["prompt"].endswith("<|im_start|>assistant\n")
    params = rendered["sampling_params"]
    assert params["max_tokens"] == core.params.max_tokens == 492
    assert (params["seed"], params["logit_bias"], params["stop_token_ids"]) == (3, {"65": 1.0}, [9])


async def test_the_grammar_is_told():
    with parted("", MarkedFormat(grammar_text='start: "x"')) as served:
        params = (await render(served, tools=TOOLS, tool_choice="required"))["sampling_params"]
        assert params["structured_outputs"] == {"grammar": 'start: "x"'}
    with serving() as served:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        response_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        params = (await render(served, response_format=response_format))["sampling_params"]
        assert params["structured_outputs"] == {"json": schema}


async def test_plain_completions():
    with serving() as served:
        answer = await served.post("/v1/completions/render", {"prompt": ["ab", "c"], "max_tokens": 3})
        first, second = answer.json
        assert (first["prompt"], first["token_ids"]) == ("ab", [97, 98])
        assert (second["prompt"], second["token_ids"]) == ("c", [99])
        assert first["sampling_params"]["max_tokens"] == 3
        assert first["request_id"] != second["request_id"]
        (only,) = (await served.post("/v1/completions/render", {"prompt": [97]})).json
        assert (only["prompt"], only["sampling_params"]["max_tokens"]) == ("a", 16)
        assert served.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"tools": TOOLS}, "tools"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"model": "other"}, "model"),
    ],
)
async def test_refuses_what_would_not_be_answered(fields: dict[str, Any], param: str):
    with serving() as served:
        refused = await served.post(CHAT, {"messages": QUESTION, **fields})
        answered = await served.post("/v1/chat/completions", {"messages": QUESTION, **fields})
        assert refused.error == answered.error
        assert refused.error["param"] == param


async def test_the_prompt_beside_an_answer():
    with serving() as served:
        rendered = await render(served)
        whole = (await served.chat(return_prompt_text=True)).json
        assert whole["prompt_text"] == rendered["prompt"]
        chunks = (await served.chat(return_prompt_text=True, stream=True)).chunks
        assert chunks[0]["prompt_text"] == rendered["prompt"]
        assert all("prompt_text" not in chunk for chunk in chunks[1:])
        assert "prompt_text" not in (await served.chat()).json
