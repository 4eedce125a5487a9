"""Every field of every endpoint with values that nobody should send: 200 or a clear 4xx, never a 500."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from jaxserve.errors import RequestError
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


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest])
def test_the_first_of_many_wrong_items_is_enough(kind: type[BaseModel]):
    """pydantic would make an error of each, which takes seconds and a gigabyte for a body of 4 MB."""
    formats = (
        ("structured_outputs", "choice"),
        ("response_format", "structures"),
        ("response_format", "triggers"),
    )
    for item in ({}, 1.5, "x", None, [], 1):
        many = [item] * 100
        bodies: list[dict[str, Any]] = [
            {field.alias or name: many} for name, field in kind.model_fields.items()
        ]
        bodies += [{outer: {"type": "structural_tag", inner: many}} for outer, inner in formats]
        bodies += [{"logit_bias": {str(i): item for i in range(2000)}}]
        for body in bodies:
            try:
                kind.model_validate({"tokens": [], **body})
            except ValidationError as error:
                assert error.error_count() < 3, body  # noqa: PT017  # of many bodies, it may be any
            except RequestError as error:
                assert error.param == "logit_bias"  # noqa: PT017


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def inside(value: Any) -> list[dict[str, Any]]:
    """Requests that have a value somewhere inside their tools and formats."""
    tools = [
        value,
        {"function": value},
        {"type": value, "function": {"name": "f"}},
        {"function": {"name": value}},
        {"function": {"name": "f", "description": value}},
        {"function": {"name": "f", "strict": True, "parameters": value}},
        {"function": {"name": "f", "strict": value, "parameters": {"properties": {"a": value}}}},
    ]
    choices = [
        value,
        {"type": value},
        {"type": "function", "function": value},
        {"type": "function", "function": {"name": value}},
        {"type": "allowed_tools", "allowed_tools": value},
        {"type": "allowed_tools", "allowed_tools": {"mode": value, "tools": value}},
    ]
    formats = [
        {"type": value},
        {"type": "json_schema", "json_schema": value},
        {"type": "json_schema", "json_schema": {"name": value, "schema": value}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"properties": value}}},
        {"type": "structural_tag", "format": value},
        {"type": "structural_tag", "structures": value, "triggers": value},
    ]
    kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag", "whitespace_pattern")
    return [
        *({"tools": [tool], "tool_choice": choice} for tool in tools for choice in ("auto", "required")),
        *({"tools": [TOOL], "tool_choice": choice} for choice in choices),
        *({"response_format": response_format} for response_format in formats),
        *({"structured_outputs": {kind: value}} for kind in kinds),
    ]


async def test_values_inside_tools_and_formats():
    flags: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with serving(**flags) as served:
        for value in NASTY[::2]:
            for fields in inside(value):
                answer = await served.chat(**fields, max_tokens=3)
                if answer.status != 200:
                    assert 400 <= answer.status < 500, (fields, answer.data)
                    error = answer.error
                    assert len(error["message"]) < 2000, fields
                    assert error["param"] in fields, (fields, error)
        assert (await served.chat()).json["choices"][0]["message"]["content"] == PARIS
        assert served.llm.num_in_flight == 0
