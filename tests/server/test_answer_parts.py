"""Answers of several parts: reasoning, content and tool calls, whole and streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scripted import saying
from tests.server.marked_format import MarkedFormat
from tests.server.recorded import Told, joined, whole
from tests.server.serving import QUESTION, Serving, say, serving
from tests.tiny import EOS, IM_START, VOCAB_SIZE

FLAGS: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]

EVERYTHING = '§think¶Hm.¶Let me see. §call f¶{"a": 1}¶ and §call g¶{}¶ done'


@contextmanager
def parted(text: str, answer_format: MarkedFormat | None = None, **options: Any) -> Iterator[Serving]:
    """A server whose answers are read by MarkedParser."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = answer_format or MarkedFormat()
        patch.setattr("jaxserve.server.state.make_answer_format", lambda *names: chosen)
        with serving(say(text), **{**FLAGS, **options}) as served:
            yield served


def reasoning_of(chunks: list[Any]) -> str:
    return "".join(c["choices"][0]["delta"].get("reasoning", "") for c in chunks if c["choices"])


async def test_the_parts_of_a_whole_answer():
    with parted(EVERYTHING) as served:
        choice = (await served.chat(tools=TOOLS, max_tokens=99)).json["choices"][0]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Let me see.  and  done",
            "refusal": None,
            "reasoning": "Hm.",
            "tool_calls": [
                {"id": "call-0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "call-1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


@pytest.mark.parametrize("tokens_per_step", [1, 2, 5, 200])
async def test_the_parts_of_a_stream(tokens_per_step: int):
    with parted(EVERYTHING, engine={"tokens_per_step": tokens_per_step}) as served:
        answer = await served.chat(tools=TOOLS, max_tokens=99)
        chunks = (await served.chat(tools=TOOLS, max_tokens=99, stream=True)).chunks
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert joined(chunks) == whole(answer.json)
    assert reasoning_of(chunks) == "Hm."
    for chunk, delta in zip(chunks[1:], deltas[1:], strict=True):
        assert len(delta) == 1 or (not delta and chunk["choices"][0]["finish_reason"])
        assert all(delta.values())
        calls = delta.get("tool_calls", [{"index": 0, "function": {"arguments": "x"}}])
        assert len(calls) == 1
        if "id" in calls[0]:
            assert set(calls[0]) == {"index", "id", "type", "function"}
            assert set(calls[0]["function"]) == {"name"}
        else:
            assert set(calls[0]) == {"index", "function"}
            assert calls[0]["function"]["arguments"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]


@given(
    parts=st.lists(
        st.sampled_from(["ab", " ", "é🎉", "§think¶", "§call f¶", "¶", "§", "§call", '{"x": 1}']), max_size=12
    ),
    tokens_per_step=st.integers(1, 9),
    max_tokens=st.integers(1, 60),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "stop": st.sampled_from(["b", "1}", "🎉"]),
            "include_reasoning": st.just(False),
            "parallel_tool_calls": st.just(False),
            "n": st.just(2),
            "logprobs": st.just(True),
        },
    ),
)
@settings(max_examples=40)
def test_a_joined_stream_is_the_whole_answer(
    parts: list[str], tokens_per_step: int, max_tokens: int, fields: dict[str, Any]
):
    async def check() -> None:
        body = {
            "tools": TOOLS,
            "max_tokens": max_tokens,
            "return_token_ids": True,
            "temperature": 0,
            **fields,
        }
        with parted("".join(parts), engine={"tokens_per_step": tokens_per_step}) as served:
            answer = (await served.chat(**body)).json
            chunks = (await served.chat(**body, stream=True)).chunks
        assert joined(chunks) == whole(answer)
        for choice in answer["choices"]:
            pieces = [p for c in chunks for p in c["choices"] if p["index"] == choice["index"]]
            assert [i for piece in pieces for i in piece.get("token_ids", [])] == choice["token_ids"]
            reasoning = "".join(piece["delta"].get("reasoning", "") for piece in pieces)
            assert reasoning == choice["message"].get("reasoning", "")
            if "logprobs" in fields:
                told = [one for piece in pieces if piece["logprobs"] for one in piece["logprobs"]["content"]]
                assert told == choice["logprobs"]["content"]
                assert len(told) == len(choice["token_ids"])

    asyncio.run(check())


async def test_tokens_whose_text_is_held_back_are_told_with_the_next_chunk():
    with parted("a§call f¶{}¶") as served:
        answer = await served.chat(tools=TOOLS, stream=True, logprobs=True, return_token_ids=True)
    said = b""
    for chunk in answer.chunks[1:]:
        piece = chunk["choices"][0]
        token_ids = piece.get("token_ids", [])
        assert len(piece["logprobs"]["content"] if piece["logprobs"] else []) == len(token_ids)
        said += bytes(token_id for token_id in token_ids if token_id != EOS)
        if piece["delta"].get("tool_calls", [{}])[0].get("id"):
            assert said.startswith("a§call f¶".encode())
    assert said.decode() == "a§call f¶{}¶"


async def test_usage_counts_tokens_that_were_held_back():
    with parted("§call f¶{}") as served:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = (await served.chat(tools=TOOLS, stream=True, stream_options=options)).chunks
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0
    assert counts[1] >= len("§call f¶".encode())
    assert counts == sorted(counts)
    assert counts[-1] == len("§call f¶{}".encode()) + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        ('§call f¶{"a": 1}¶', {}, "tool_calls"),
        ('§call f¶{"a": 1}¶', {"max_tokens": 12}, "length"),
        ("§call f", {}, "stop"),
        ("no call", {}, "stop"),
        ('§call f¶{"a": 1}¶ so', {"stop": " so"}, "tool_calls"),
        ("§think¶Hm.", {}, "stop"),
    ],
)
async def test_finish_reasons(text: str, fields: dict[str, Any], reason: str, stream: bool):
    with parted(text) as served:
        answer = await served.chat(tools=TOOLS, stream=stream, **fields)
    (told,) = joined(answer.chunks) if stream else whole(answer.json)
    assert told.finish_reason == reason
    assert told.stop_reason == fields.get("stop")


async def test_content_is_null_beside_other_parts_only():
    for text, content in [("§call f¶{}", None), ("§think¶Hm.", None), ("", ""), ("x", "x")]:
        with parted(text) as served:
            message = (await served.chat(tools=TOOLS)).json["choices"][0]["message"]
            assert message["content"] == content
            assert ("tool_calls" in message) == ("call" in text)
            assert ("reasoning" in message) == ("think" in text)


async def test_include_reasoning_false():
    with parted(EVERYTHING) as served:
        fields = {"tools": TOOLS, "include_reasoning": False, "max_tokens": 99}
        message = (await served.chat(**fields)).json["choices"][0]["message"]
        assert "reasoning" not in message
        assert message["content"] == "Let me see.  and  done"
        assert reasoning_of((await served.chat(**fields, stream=True)).chunks) == ""


async def test_parallel_tool_calls_false():
    with parted(EVERYTHING) as served:
        answer = await served.chat(tools=TOOLS, parallel_tool_calls=False, max_tokens=99)
        (told,) = whole(answer.json)
        assert told.calls == (("f", '{"a": 1}'),)
        assert told.text == "Let me see.  and  done"


async def test_echo_comes_before_the_parts():
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "So:"}]
    with parted("x§call f¶{}") as served:
        for stream in (False, True):
            answer = await served.chat(messages=messages, echo=True, tools=TOOLS, stream=stream)
            (told,) = joined(answer.chunks) if stream else whole(answer.json)
            assert told.text == "So:x"
            assert told.calls == (("f", "{}"),)


async def test_calls_are_looked_for_only_where_tools_are_offered():
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer_format = MarkedFormat(reasoning=None)
        with parted("§call f¶{}", answer_format) as served:
            (told,) = whole((await served.chat(**fields)).json)
            assert told.text == "§call f¶{}"
            assert answer_format.asked == []


async def test_what_the_parser_is_told():
    answer_format = MarkedFormat(grammar_text='start: "x"')
    with parted("", answer_format) as served:
        await served.chat(tools=TOOLS, tool_choice="required")
        asked, about = answer_format.asked
        assert asked == {"tools": TOOLS, "tool_choice": "required", "parallel": True}
        assert about["tools"] == TOOLS
        assert about["constrained"] is True
        assert about["prompt"].endswith("<|im_start|>assistant\n")
        answer_format.asked.clear()
        only_g = {"type": "function", "function": {"name": "g"}}
        await served.chat(tools=TOOLS, tool_choice=only_g)
        assert answer_format.asked[0] == {"tools": [TOOLS[1]], "tool_choice": only_g, "parallel": False}
        answer_format.asked.clear()
        await served.chat(tools=TOOLS, tool_choice="none")
        assert [about["tools"] for about in answer_format.asked] == [[]]


@pytest.mark.parametrize("stream", [False, True])
async def test_special_tokens_that_mark_calls_are_kept_and_no_others(stream: bool):
    call = b'[{"name": "f", "arguments": {"a": 1}}]'
    script = saying([*b"Hi", IM_START, *b" you", VOCAB_SIZE, *call])
    options = {**FLAGS, "tool_call_parser": "mistral", "special_tokens": ("[TOOL_CALLS]",)}
    with serving(script, **options) as served:

        async def told(**fields: Any) -> Told:
            answer = await served.chat(tools=TOOLS, stream=stream, **fields)
            return (joined(answer.chunks) if stream else whole(answer.json))[0]

        assert await told() == Told("Hi you", (("f", '{"a": 1}'),), "tool_calls")
        assert await told(skip_special_tokens=False) == Told(
            "Hi<|im_start|> you", (("f", '{"a": 1}'),), "tool_calls"
        )
        assert await told(tool_choice="none") == Told(f"Hi you{call.decode()}", (), "stop")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1}', Told('{"a": 1}', (), "stop")),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', Told("", (("f", "{}"),), "tool_calls")),
    ],
)
async def test_a_response_format_beside_tools(text: str, told: Told):
    with serving(say(text), **FLAGS) as served:
        fields: dict[str, Any] = {"tools": TOOLS, "response_format": {"type": "json_object"}}
        assert whole((await served.chat(**fields)).json) == [told]
        rendered = (await served.post("/v1/chat/completions/render", {"messages": QUESTION, **fields})).json
        constraint = rendered["sampling_params"]["structured_outputs"]
        assert constraint["json_object"] is True
        assert "arguments" in constraint["alternative"]


async def test_tools_that_no_grammar_can_hold_leave_the_format_alone():
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "no-such-type"}}}
    with serving(**FLAGS) as served:
        fields: dict[str, Any] = {"tools": [broken], "response_format": {"type": "json_object"}}
        rendered = (await served.post("/v1/chat/completions/render", {"messages": QUESTION, **fields})).json
        assert rendered["sampling_params"]["structured_outputs"] == {"json_object": True}
        for choice in ("required", {"type": "function", "function": {"name": "f"}}):
            refused = await served.chat(tools=[broken], tool_choice=choice)
            assert refused.status == 400
            assert refused.error["param"] == "tools"
            assert "no-such-type" in refused.error["message"]
        broken["function"]["strict"] = True
        assert (await served.chat(tools=[broken])).error["param"] == "tools"


async def test_a_constraint_begins_behind_the_reasoning():
    for marks in ((None, "</think>"), ("<think>", "</think>"), None):
        with parted("", MarkedFormat(marks=marks)) as served:
            body = {"messages": QUESTION, "response_format": {"type": "json_object"}}
            rendered = (await served.post("/v1/chat/completions/render", body)).json
            told = rendered["sampling_params"]["structured_outputs"]
            assert (told.get("reasoning_start"), told.get("reasoning_end")) == (marks or (None, None))
