"""Every field of every endpoint with values that nobody should send: 200 or a clear 4xx, never a 500."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from jaxserve.server.unsupported import CHAT_FIELDS, COMPLETION_FIELDS
from tests.server.serving import PARIS, QUESTION, serving

DEEP: Any = "x"
for _ in range(90):
    DEEP = [DEEP]

NASTY: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**300,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "\0",
    "a" * 5000,
    "\U0001f389\u202e\ufffe",
    "{{ 7 * 7 }}",
    "NaN",
    [],
    [None],
    [[]],
    [0],
    [2**63],
    [-1],
    ["\0"],
    [True],
    [{}],
    ["a", 1],
    DEEP,
    {},
    {"": None},
    {"a": DEEP},
    {"0": 1e308},
    {"role": "user", "content": []},
    [{"role": "assistant", "content": [{"type": "text", "text": None}]}],
    [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "tool", "tool_calls": {"a": 1}, "content": {"b": 2}}],
]

ENDPOINTS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "/v1/chat/completions",
        {"messages": QUESTION, "max_tokens": 3},
        [*ChatRequest.model_fields, *CHAT_FIELDS],
    ),
    (
        "/v1/completions",
        {"prompt": "a", "max_tokens": 3},
        [*CompletionRequest.model_fields, *COMPLETION_FIELDS],
    ),
    ("/tokenize", {"messages": QUESTION}, list(TokenizeRequest.model_fields)),
    ("/tokenize", {"prompt": "a"}, list(TokenizeRequest.model_fields)),
    ("/detokenize", {"tokens": [65]}, list(DetokenizeRequest.model_fields)),
]


STREAMS = [(path, {**usual, "stream": True}, fields) for path, usual, fields in ENDPOINTS[:2]]


@pytest.mark.parametrize(("path", "usual", "fields"), ENDPOINTS + STREAMS)
async def test_never_an_error_of_ours(path: str, usual: dict[str, Any], fields: list[str]):
    with serving(trust_request_chat_template=True, log_requests=True) as served:
        for field in fields:
            for value in NASTY[::2] if "stream" in usual else NASTY:
                answer = await served.post(path, {**usual, field: value})
                if answer.status == 200:
                    assert b'"error"' not in answer.data, (field, value)
                    continue
                assert 400 <= answer.status < 500, (field, value, answer.data)
                error = answer.error
                assert len(error["message"]) < 2000, (field, value)
                assert error["param"] is not None, (field, value, error)
        assert (await served.chat()).json["choices"][0]["message"]["content"] == PARIS
        assert served.llm.num_in_flight == 0
