"""Built-in formats behind vLLM's interface."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxserve.server.parser_api.abstract import ToolParser, ToolParserManager
from jaxserve.server.parser_api.protocol import ChatCompletionToolsParam, DeltaMessage, FunctionDefinition
from jaxserve.server.parser_api.requests import ChatCompletionRequest
from jaxserve.server.plugins.tokenizer import PluginTokenizer
from jaxserve.server.tool_parsers.declared import DeclaredToolParser
from jaxserve.server.toolcheck.writers import WRITERS
from tests.tiny import byte_tokenizer

CALLS: list[tuple[str, dict[str, Any]]] = [("get_weather", {"city": "Tokyo", "days": 2}), ("now", {})]
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}}
WEATHER = FunctionDefinition(name="get_weather", parameters={"type": "object", "properties": PROPERTIES})
REQUEST = ChatCompletionRequest(messages=[], tools=[ChatCompletionToolsParam(function=WEATHER)])


def parser(name: str, tools: list[ChatCompletionToolsParam] | None = None) -> ToolParser:
    """A fresh parser by its name."""
    return ToolParserManager.get_tool_parser(name)(PluginTokenizer(byte_tokenizer()), tools)


def stream(tool_parser: ToolParser, text: str, step: int) -> list[DeltaMessage]:
    """The deltas that a stream of pieces gives."""
    deltas: list[DeltaMessage] = []
    for start in range(0, len(text), step):
        delta_text = text[start : start + step]
        delta = tool_parser.extract_tool_calls_streaming(
            text[:start], text[: start + len(delta_text)], delta_text, [], [], [], REQUEST
        )
        if delta is not None:
            assert delta.content or delta.tool_calls
            deltas.append(delta)
    return deltas


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_whole_answers_and_streams_give_the_same_calls(name):
    text = WRITERS[name](CALLS)
    whole = parser(name).extract_tool_calls(text, REQUEST)
    assert whole.tools_called
    assert whole.content is None
    assert [call.function.name for call in whole.tool_calls] == ["get_weather", "now"]
    assert [json.loads(call.function.arguments) for call in whole.tool_calls] == [CALLS[0][1], {}]
    for step in (1, 4, 1000):
        streaming = parser(name)
        told = [call for delta in stream(streaming, text, step) for call in delta.tool_calls]
        firsts = [call for call in told if call.id is not None]
        assert [call.function.name for call in firsts if call.function] == ["get_weather", "now"]
        assert [call.type for call in firsts] == ["function", "function"]
        arguments = ["", ""]
        for call in told:
            assert call.function is not None
            arguments[call.index] += call.function.arguments or ""
        assert arguments == [call.function.arguments for call in whole.tool_calls]
        assert streaming.streamed_args_for_tool == arguments
        assert [call["name"] for call in streaming.prev_tool_call_arr] == ["get_weather", "now"]
        assert (streaming.current_tool_id, streaming.current_tool_name_sent) == (1, True)
        assert streaming.get_remaining_unstreamed_args() == ""


def test_text_comes_out_as_it_is():
    text = "This has nothing to do with tool calls."
    assert parser("hermes").extract_tool_calls(text, REQUEST).content == text
    deltas = stream(parser("hermes"), text, 1)
    assert len(deltas) == len(text)
    assert "".join(delta.content or "" for delta in deltas) == text


def test_pieces_can_be_given_without_the_text_before_them():
    text, same, told = f"a {WRITERS['granite4'](CALLS)} b", parser("granite4"), []
    for character in text:
        delta = same.extract_tool_calls_streaming("", "", character, [], [], [], REQUEST)
        told += [] if delta is None else [delta]
    assert "".join(delta.content or "" for delta in told) == "a  b"
    assert same.streamed_args_for_tool == ['{"city": "Tokyo", "days": 2}', "{}"]


def test_one_object_reads_one_answer_after_the_other():
    same = parser("mistral")
    for _ in range(2):
        stream(same, '[TOOL_CALLS]f{"a": 1}', 5)
        assert same.streamed_args_for_tool == ['{"a": 1}']
    (call,) = same.extract_tool_calls("[TOOL_CALLS]f{}", REQUEST).tool_calls
    assert len(call.id) == 9


def test_the_tools_tell_how_to_read_values():
    schema = {"type": "object", "properties": {"zip": {"type": "string"}}}
    tool = ChatCompletionToolsParam(function=FunctionDefinition(name="f", parameters=schema))
    text = "<|tool_call>call:f{zip:0123}<tool_call|>"
    (call,) = parser("gemma4", [tool]).extract_tool_calls(text, REQUEST).tool_calls
    assert call.function.arguments == '{"zip": "0123"}'
    asking = ChatCompletionRequest(messages=[], tools=[tool], tool_choice="auto")
    (call,) = parser("gemma4").extract_tool_calls(text, asking).tool_calls
    assert call.function.arguments == '{"zip": "0123"}'
    assert parser("gemma4").adjust_request(asking).skip_special_tokens is False


def test_harmony_is_a_class_too():
    text = '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>'
    (call,) = parser("openai").extract_tool_calls(text, REQUEST).tool_calls
    assert (call.function.name, call.function.arguments) == ("f", '{"a": 1}')


def test_classes_can_be_derived_from():
    class Loud(ToolParserManager.get_tool_parser("hermes")):
        def extract_tool_calls(self, model_output, request):
            return super().extract_tool_calls(model_output.lower(), request)

    found = Loud(PluginTokenizer(byte_tokenizer())).extract_tool_calls(
        '<TOOL_CALL>{"NAME": "F"}</TOOL_CALL>', REQUEST
    )
    assert [call.function.name for call in found.tool_calls] == ["f"]


def test_names():
    assert issubclass(ToolParserManager.get_tool_parser("llama4_json"), DeclaredToolParser)
    assert ToolParserManager.get_tool_parser("llama4_json") is ToolParserManager.get_tool_parser(
        "llama3_json"
    )
    assert {"hermes", "pythonic", "openai"} <= set(ToolParserManager.list_registered())
    with pytest.raises(KeyError, match="hermse"):
        ToolParserManager.get_tool_parser("hermse")
