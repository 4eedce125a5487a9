"""Plug-ins are called as vLLM calls them, and what they say becomes events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import RequestError, RequestFailedError
from jaxserve.server.parser_api.abstract import ToolParser
from jaxserve.server.parser_api.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from jaxserve.server.parser_api.reasoning import ReasoningParser
from jaxserve.server.parser_api.requests import ChatCompletionRequest
from jaxserve.server.parser_api.thinking import DeepSeekR1ReasoningParser, IdentityReasoningParser
from jaxserve.server.parsing.events import CallArguments, CallStart, Content, Event, Reasoning
from jaxserve.server.plugins.answers import (
    ReasoningPluginAnswer,
    ToolPluginAnswer,
    make_reasoning_parser,
    make_tool_parser,
)
from jaxserve.server.plugins.pieces import TokenPieces
from jaxserve.server.plugins.request import adjusted, plugin_request
from jaxserve.server.plugins.small_helpers import VLLMValidationError
from jaxserve.server.plugins.tokenizer import PluginTokenizer
from jaxserve.server.protocol import ChatRequest
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.tiny import EOS, IM_END, IM_START, TOOL_CALL, byte_tokenizer

TOKENIZER = PluginTokenizer(byte_tokenizer())
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
REQUEST = plugin_request({"messages": [], "tools": [WEATHER]})
Call = tuple[str, str, str, list[int], list[int], list[int]]


class Recording(ToolParser):
    """Remembers its calls and says what it is told to say."""

    def __init__(self, tokenizer: Any, says: Sequence[DeltaMessage | Exception | None] = ()) -> None:
        super().__init__(tokenizer)
        self.calls: list[Call] = []
        self.says = list(says)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: ChatCompletionRequest,
    ) -> DeltaMessage | None:
        """Remember."""
        before, now, new = map(list, (previous_token_ids, current_token_ids, delta_token_ids))
        self.calls.append((previous_text, current_text, delta_text, before, now, new))
        said = self.says.pop(0) if self.says else None
        if isinstance(said, Exception):
            raise said
        return said

    def extract_tool_calls(
        self, model_output: str, request: ChatCompletionRequest
    ) -> ExtractedToolCallInformation:
        """A call if the text has one."""
        if "CALL" not in model_output:
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)
        before, _, name = model_output.partition("CALL ")
        call = ToolCall(id="c1", function=FunctionCall(name=name, arguments='{"a": 1}'))
        return ExtractedToolCallInformation(tools_called=True, tool_calls=[call], content=before or None)


def streamed(parser: ToolParser, request: ChatCompletionRequest = REQUEST) -> ToolPluginAnswer:
    return ToolPluginAnswer(parser, request, TOKENIZER, streamed=True)


def call(index: int, **fields: Any) -> DeltaMessage:
    function = DeltaFunctionCall(name=fields.get("name"), arguments=fields.get("arguments"))
    return DeltaMessage(tool_calls=[DeltaToolCall(index=index, id=fields.get("id"), function=function)])


def test_one_token_a_call() -> None:
    """Texts and ids so far, then and now, for each token; the end token comes without text."""
    parser = Recording(TOKENIZER)
    answer = streamed(parser)
    answer.push("hé<tool_call>", [*"hé".encode(), TOOL_CALL])
    answer.push("", [EOS])
    assert [one[:3] for one in parser.calls] == [
        ("", "h", "h"),
        ("h", "h", ""),
        ("h", "hé", "é"),
        ("hé", "hé<tool_call>", "<tool_call>"),
        ("hé<tool_call>", "hé<tool_call>", ""),
    ]
    ids = [*"hé".encode(), TOOL_CALL, EOS]
    assert [one[3:] for one in parser.calls] == [(ids[:i], ids[: i + 1], ids[i : i + 1]) for i in range(5)]


def test_text_that_lags_behind() -> None:
    """What was held back, for a stop string, comes with a later token, or with none."""
    parser = Recording(TOKENIZER)
    answer = streamed(parser)
    answer.push("a", list(b"abc"))  # "bc" may begin a stop string
    answer.push("bcd", list(b"d"))
    answer.push("e", [])
    answer.push("", [])
    assert [(one[2], one[5]) for one in parser.calls] == [
        ("a", [97]), ("", [98]), ("", [99]), ("bcd", [100]), ("e", []),
    ]  # fmt: skip


@given(st.text(max_size=10), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=4))
def test_pieces_are_the_text(text: str, cuts: list[tuple[float, float]]) -> None:
    """However tokens and text are handed over, the pieces are the text, and each token is there once."""
    ids = list(text.encode())
    text_cuts, id_cuts = (
        (sorted([0.0, 1.0, *each]) for each in zip(*cuts, strict=True)) if cuts else ([0, 1], [0, 1])
    )
    pieces, out_text, out_ids = TokenPieces(TOKENIZER.jaxserve_tokenizer), "", []
    for i in range(1, len(text_cuts)):
        some_text = text[int(text_cuts[i - 1] * len(text)) : int(text_cuts[i] * len(text))]
        some_ids = ids[int(id_cuts[i - 1] * len(ids)) : int(id_cuts[i] * len(ids))]
        for piece, piece_ids in pieces.push(some_text, some_ids):
            assert len(piece_ids) <= 1
            out_text, out_ids = out_text + piece, out_ids + piece_ids
    assert (out_text, out_ids) == (text, ids)


def test_special_tokens_in_the_text() -> None:
    """A parser that wants special tokens gets each with its own text."""
    changed = REQUEST.model_copy(update={"skip_special_tokens": False})
    parser = Recording(TOKENIZER)
    streamed(parser, changed).push("<|im_start|>x<|im_end|>", [IM_START, 120, IM_END])
    assert [one[2] for one in parser.calls] == ["<|im_start|>", "x", "<|im_end|>"]
    parser = Recording(TOKENIZER)
    streamed(parser).push("x", [IM_START, 120, IM_END])
    assert [one[2] for one in parser.calls] == ["", "x", ""]


def test_deltas_become_events() -> None:
    """Content before calls; names once; calls are counted from 0 in the order in which they come."""
    both = call(5, name="f", arguments='{"a"', id="given")
    both.content = "see: "
    parser = Recording(
        TOKENIZER,
        [
            DeltaMessage(content=""),
            both,
            call(5, name="f", arguments=": 1}"),
            call(7, name="g"),
            None,
            DeltaMessage(tool_calls=[DeltaToolCall(index=7)]),
        ],
    )
    events = streamed(parser).push("abcdef", list(b"abcdef"))
    assert events[:-1] == [
        Content("see: "),
        CallStart(0, "given", "f"),
        CallArguments(0, '{"a"'),
        CallArguments(0, ": 1}"),
    ]
    last = events[-1]
    assert isinstance(last, CallStart)
    assert (last.index, last.name) == (1, "g")
    assert last.id.startswith("chatcmpl-tool-")


def test_arguments_still_owed() -> None:
    """vLLM's last look: only where the answer ended within a call."""
    parser = Recording(TOKENIZER, [call(0, name="f", arguments='{"a": "x'), None])
    parser.prev_tool_call_arr = [{"name": "f", "arguments": {"a": "xy"}}]
    parser.streamed_args_for_tool = ['{"a": "x']
    answer = streamed(parser)
    answer.push("a", [97])
    assert answer.finish() == [CallArguments(0, 'y"}')]
    answer.push("b", [98])
    assert answer.finish() == []
    assert streamed(Recording(TOKENIZER)).finish() == []


def test_text_that_was_held_back() -> None:
    """vLLM loses what a parser holds back when the answer ends; here it is told, if it is no call."""
    parser = Recording(TOKENIZER, [DeltaMessage(content="a"), None, None])
    answer = ToolPluginAnswer(parser, REQUEST, TOKENIZER, streamed=True)
    answer.push("abc", list(b"abc"))
    assert answer.finish() == [Content("bc")]
    is_call = ToolPluginAnswer(Recording(TOKENIZER), REQUEST, TOKENIZER, streamed=True)
    is_call.push("CALL f", list(b"CALL f"))
    assert is_call.finish() == []  # the parser has its reasons
    other = Recording(TOKENIZER, [DeltaMessage(content="A")])
    changed = ToolPluginAnswer(other, REQUEST, TOKENIZER, streamed=True)
    changed.push("ab", list(b"ab"))
    assert changed.finish() == []


def test_not_streamed() -> None:
    """The whole text goes to extract_tool_calls, once."""

    def whole(text: str) -> list[Event]:
        answer = ToolPluginAnswer(Recording(TOKENIZER), REQUEST, TOKENIZER, streamed=False)
        assert answer.push(text[:3], list(text[:3].encode())) == []
        answer.push(text[3:], list(text[3:].encode()))
        return answer.finish()

    assert whole("just text") == [Content("just text")]
    assert whole("") == []
    assert whole("let me CALL f") == [
        Content("let me "),
        CallStart(0, "c1", "f"),
        CallArguments(0, '{"a": 1}'),
    ]


def test_errors_fail_the_one_request() -> None:
    """Whatever a plug-in raises is a RequestFailedError that names it, but for its refusals."""
    answer = streamed(Recording(TOKENIZER, [KeyError("lost")]))
    with pytest.raises(RequestFailedError, match=r"test_answers\.Recording failed .*KeyError: 'lost'"):
        answer.push("a", [97])
    with pytest.raises(RequestError, match="not with me") as caught:
        streamed(Recording(TOKENIZER, [VLLMValidationError("not with me", parameter="tools")])).push(
            "a", [97]
        )
    assert caught.value.param == "tools"
    with pytest.raises(RequestFailedError, match="before its name"):
        streamed(Recording(TOKENIZER, [call(0, arguments="{")])).push("a", [97])
    with pytest.raises(RequestFailedError, match="does not implement extract_tool_calls"):
        ToolPluginAnswer(ToolParser(TOKENIZER), REQUEST, TOKENIZER, streamed=False).finish()


def test_making_parsers() -> None:
    """Classes of all times are made with what they take."""

    class Old(ToolParser):
        def __init__(self, tokenizer: Any) -> None:
            super().__init__(tokenizer)
            self.size = len(self.vocab)

    class Broken(ToolParser):
        def __init__(self, tokenizer: Any) -> None:
            raise RuntimeError("no <x> token")

    class Thinking(ReasoningParser):
        def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(tokenizer)
            self.kwargs = kwargs

    assert make_tool_parser(Old, TOKENIZER, REQUEST).tools == []
    assert make_tool_parser(ToolParser, TOKENIZER, REQUEST).tools[0].function.name == "weather"
    with pytest.raises(RequestFailedError, match=r"Broken failed .*no <x> token"):
        make_tool_parser(Broken, TOKENIZER, REQUEST)
    request = plugin_request({"messages": [], "chat_template_kwargs": {"thinking": True}})
    made = make_reasoning_parser(Thinking, TOKENIZER, request)
    assert isinstance(made, Thinking)
    assert made.kwargs == {"chat_template_kwargs": {"thinking": True}}
    assert make_reasoning_parser(IdentityReasoningParser, TOKENIZER, request).is_reasoning_end([])


def test_requests_in_forms_that_vllm_does_not_know() -> None:
    """What is odd is left out, and nothing fails."""
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}}
    fields = {"messages": [], "tools": [WEATHER], "tool_choice": allowed, "documents": "none", "seed": 7}
    request = plugin_request({**fields, "structured_outputs": {"regex": "x", "backend": "y"}}, [WEATHER])
    assert (request.tool_choice, request.documents, request.seed) == ("required", None, 7)
    assert request.structured_outputs is not None
    assert request.structured_outputs.regex == "x"


def test_adjusted_requests() -> None:
    """What adjust_request changes is told; the request stays as it was."""

    class Adjusting(ToolParser):
        def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
            request = super().adjust_request(request)
            request.skip_special_tokens = False
            return request

    fields = ChatRequest.model_validate(
        {"messages": [{"role": "user"}], "tools": [WEATHER], "top_k": 3, "foo": 1}
    )
    request = plugin_request(fields)
    assert (request.top_k, request.tool_choice, request.temperature) == (3, "auto", None)
    assert request.model_dump()["foo"] == 1
    assert adjusted(Adjusting(TOKENIZER), request) == {"skip_special_tokens": False}
    assert request.skip_special_tokens
    request = plugin_request({"messages": [], "tools": [WEATHER], "tool_choice": "required"})
    held = adjusted(Adjusting(TOKENIZER), request)["structured_outputs"]
    assert isinstance(held, StructuredOutputsParams)
    assert held.kind == "json"
    Adjusting.supports_required_and_named = False
    assert set(adjusted(Adjusting(TOKENIZER), request)) == {"skip_special_tokens"}


class Rest:
    """Content, with the ids that came with it."""

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """Say both."""
        return [Content(f"{text}{list(token_ids)}")]

    def finish(self) -> list[Event]:
        """Say so."""
        return [Content("end")]


class TagThinking(DeepSeekR1ReasoningParser):
    """With tokens that the byte tokenizer has."""

    @property
    def start_token(self) -> str:
        """Opens."""
        return "<tool_call>"

    @property
    def end_token(self) -> str:
        """Closes."""
        return "</tool_call>"


END = TOOL_CALL + 1


def test_reasoning_streamed() -> None:
    """Reasoning until the end token; what comes then goes on, with its own ids."""
    answer = ReasoningPluginAnswer(TagThinking(TOKENIZER), REQUEST, TOKENIZER, Rest(), streamed=True)
    assert answer.push("<tool_call>hm", [TOOL_CALL, 104, 109]) == [Reasoning("h"), Reasoning("m")]
    assert answer.push("</tool_call>so", [END, 115, 111]) == [Content("s[115]"), Content("o[111]")]
    assert answer.push("!", [33]) == [Content("![33]")]
    assert answer.finish() == [Content("end")]


def test_reasoning_not_streamed() -> None:
    """The whole answer is told apart at its end."""
    answer = ReasoningPluginAnswer(TagThinking(TOKENIZER), REQUEST, TOKENIZER, Rest(), streamed=False)
    assert answer.push("hm</tool_call>so", [104, 109, END, 115, 111]) == []
    assert answer.finish() == [Reasoning("hm"), Content("so[115, 111]"), Content("end")]
    cut = ReasoningPluginAnswer(TagThinking(TOKENIZER), REQUEST, TOKENIZER, Rest(), streamed=False)
    cut.push("hm", [104, 109])
    assert cut.finish() == [Reasoning("hm"), Content("[]"), Content("end")]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_prompt_that_ends_reasoning(is_streamed: bool) -> None:
    """Where the template has closed the thinking, all is answer."""
    answer = ReasoningPluginAnswer(
        TagThinking(TOKENIZER),
        REQUEST,
        TOKENIZER,
        Rest(),
        streamed=is_streamed,
        prompt_token_ids=[TOOL_CALL, END],
    )
    assert [*answer.push("so", [115, 111]), *answer.finish()] == [Content("so[115, 111]"), Content("end")]
