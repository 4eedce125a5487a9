"""Tool calls and structured answers through the openai client's helpers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.server.openai_client import openai_client
from tests.server.serving import QUESTION, listening, say, serving

FLAGS: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}

ONE_CALL = (
    '<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>'
)
OTHER_CALL = '<tool_call>\n{"name": "GetTime", "arguments": {"city": "Tokyo"}}\n</tool_call>'


class GetWeather(pydantic.BaseModel):
    """Get the current weather in a city."""

    city: str
    unit: Literal["celsius", "fahrenheit"]


class GetTime(pydantic.BaseModel):
    """What time it is in a city."""

    city: str


class Capital(pydantic.BaseModel):
    """A country's capital."""

    city: str
    population: int


TOOLS = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(GetTime)]


@asynccontextmanager
async def client_for(text: str) -> AsyncIterator[openai.AsyncOpenAI]:
    with serving(say(text), info={"max_model_len": 4096}, **FLAGS) as served:
        async with listening(served) as url, openai_client(url) as client:
            yield client


@pytest.mark.parametrize("text", [ONE_CALL, f"Let me check. {ONE_CALL}\n{OTHER_CALL}"])
async def test_stream_helper_with_tools(text: str):
    async with client_for(text) as client:
        async with client.chat.completions.stream(
            model="scripted", messages=QUESTION, tools=TOOLS, stream_options={"include_usage": True}
        ) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_completion()
        plain = await client.chat.completions.create(model="scripted", messages=QUESTION, tools=TOOLS)
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    message = final.choices[0].message
    assert message.tool_calls is not None
    assert [event.parsed_arguments for event in done] == [
        call.function.parsed_arguments for call in message.tool_calls
    ]
    assert done[0].parsed_arguments == GetWeather(city="Paris", unit="celsius")
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in deltas if event.index == 0) == done[0].arguments
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.usage == plain.usage
    other = plain.choices[0].message
    assert other.tool_calls is not None
    assert (message.content or None) == other.content
    assert [call.function.arguments for call in message.tool_calls] == [
        call.function.arguments for call in other.tool_calls if call.type == "function"
    ]
    assert all(call.id.startswith("chatcmpl-tool-") for call in message.tool_calls)


async def test_parse_with_tools():
    async with client_for(f"{ONE_CALL}\n{OTHER_CALL}") as client:
        answer = await client.chat.completions.parse(
            model="scripted", messages=QUESTION, tools=TOOLS, tool_choice="required"
        )
    message = answer.choices[0].message
    assert message.content is None
    assert [call.function.parsed_arguments for call in message.tool_calls or ()] == [
        GetWeather(city="Paris", unit="celsius"),
        GetTime(city="Tokyo"),
    ]


async def test_parse_and_stream_with_a_response_format():
    async with client_for('{"city": "Paris", "population": 2100000}') as client:
        answer = await client.chat.completions.parse(
            model="scripted", messages=QUESTION, response_format=Capital
        )
        assert answer.choices[0].message.parsed == Capital(city="Paris", population=2100000)
        async with client.chat.completions.stream(
            model="scripted", messages=QUESTION, response_format=Capital
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == Capital(city="Paris", population=2100000)


async def test_an_answer_that_is_cut_off():
    async with client_for(ONE_CALL) as client:

        async def cut_at(max_tokens: int) -> None:
            async with client.chat.completions.stream(
                model="scripted", messages=QUESTION, tools=TOOLS, max_completion_tokens=max_tokens
            ) as stream:
                await stream.until_done()

        for max_tokens in (20, 60):
            with pytest.raises(openai.LengthFinishReasonError):
                await cut_at(max_tokens)
