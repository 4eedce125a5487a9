"""Plug-ins in the place of built-in formats: AnswerFormat asks them for parsers and constraints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic_core import to_jsonable_python

from jaxserve.errors import ConfigError, RequestFailedError
from jaxserve.server.parser_api.abstract import ToolParser, ToolParserManager
from jaxserve.server.parser_api.reasoning import ReasoningParser, ReasoningParserManager
from jaxserve.server.parser_api.requests import ChatCompletionRequest
from jaxserve.server.parser_api.schemas import get_json_schema_from_tools
from jaxserve.server.parsing.events import AnswerParser
from jaxserve.server.parsing.stages import AllContent
from jaxserve.server.plugins.answers import (
    ReasoningPluginAnswer,
    ToolPluginAnswer,
    make_reasoning_parser,
    make_tool_parser,
)
from jaxserve.server.plugins.request import adjusted, is_forced, plugin_request
from jaxserve.server.plugins.tokenizer import PluginTokenizer
from jaxserve.server.protocol import ChatRequest
from jaxserve.server.tool_parsers.elements import InOrder, Many, Mark, Space
from jaxserve.server.tool_parsers.json_calls import JsonCall
from jaxserve.server.tool_parsers.tool_format import ToolFormat
from jaxserve.text.tokenizer import Tokenizer

# How vLLM has calls written that must be made, whatever the model's own format is, unless a parser says otherwise.
_FORCED_CALLS = ToolFormat(
    names=("json",),
    section=InOrder(Mark("["), Space(), Many(JsonCall(argument_keys=("parameters", "arguments")), end="]")),
    begins_at_start=("[",),
)


class ToolPluginFormat:
    """A tool parser that a plug-in registered.

    Raises ConfigError when the class cannot be made for this tokenizer.
    """

    markers: frozenset[str] = frozenset()  # plug-ins ask for special tokens by adjust_request
    is_marked = False
    tells_reasoning = False

    def __init__(self, name: str, cls: type[ToolParser], tokenizer: PluginTokenizer) -> None:
        self._cls = cls
        self._tokenizer = tokenizer
        try:
            make_tool_parser(cls, tokenizer, plugin_request({"messages": []}))
        except RequestFailedError as error:
            raise ConfigError(f"tool_call_parser={name!r} does not fit this model: {error}") from error

    def adjusted(self, request: ChatCompletionRequest) -> dict[str, Any]:
        """The fields that the parser wants changed.

        A constraint that is vLLM's own for forced calls is left out: `grammar` says the same.
        Raises RequestFailedError when the parser fails.
        """
        changes = adjusted(make_tool_parser(self._cls, self._tokenizer, request), request)
        held = changes.get("structured_outputs")
        if self._is_json(request) and held is not None and held.json == _schema(request):
            del changes["structured_outputs"]
        return changes

    def parser(
        self, tools: Sequence[Mapping[str, Any]], *, constrained: bool = False, request: object = None
    ) -> AnswerParser:
        """Reads the calls out of one answer to `request`, which is a ChatRequest or a ChatCompletionRequest.

        Raises RequestFailedError when the parser fails.
        """
        seen = (
            request if isinstance(request, ChatCompletionRequest) else plugin_request(_fields(request), tools)
        )
        if self._is_json(seen):
            return _FORCED_CALLS.parser(tools, constrained=constrained)
        parser = make_tool_parser(self._cls, self._tokenizer, seen)
        return ToolPluginAnswer(parser, seen, self._tokenizer, streamed=bool(seen.stream))

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        *,
        parallel_tool_calls: bool,
        tokenizer: Tokenizer,
    ) -> str | None:
        """Forced calls are held to plain JSON; None where the parser reads the model's own format.

        Raises RequestError for what cannot be held to.
        """
        if tool_choice == "auto" or not self._cls.supports_required_and_named:
            return None
        return _FORCED_CALLS.grammar(
            tools, tool_choice, parallel_tool_calls=parallel_tool_calls, tokenizer=tokenizer
        )

    def _is_json(self, request: ChatCompletionRequest) -> bool:
        return is_forced(request) and self._cls.supports_required_and_named


class ReasoningPluginFormat:
    """A reasoning parser that a plug-in registered, with what ReasoningFormat tells of its marks.

    Raises ConfigError when the class cannot be made for this tokenizer.
    """

    markers: frozenset[str] = frozenset()
    has_calls = False

    def __init__(self, name: str, cls: type[ReasoningParser], tokenizer: PluginTokenizer) -> None:
        self._cls = cls
        self._tokenizer = tokenizer
        try:
            self._probe = make_reasoning_parser(cls, tokenizer, plugin_request({"messages": []}))
        except RequestFailedError as error:
            raise ConfigError(f"reasoning_parser={name!r} does not fit this model: {error}") from error
        self.starts = _strings(self._probe, "reasoning_start_str", "start_token", "think_start_token")
        self.ends = _strings(self._probe, "reasoning_end_str", "end_token", "think_end_token")
        self._prompt_ids = lru_cache(maxsize=1)(self._encode)

    def marks_before_answer(self, prompt: str) -> tuple[str | None, str] | None:
        """As vLLM takes it, an answer begins with reasoning unless its prompt has ended it."""
        if not self.ends or self._probe.is_reasoning_end(self._prompt_ids(prompt)):
            return None
        return (None, self.ends[0])

    def adjusted(self, request: ChatCompletionRequest) -> dict[str, Any]:
        """The fields that the parser wants changed.  Raises RequestFailedError when the parser fails."""
        return adjusted(make_reasoning_parser(self._cls, self._tokenizer, request), request)

    def parser(self, prompt: str = "", *, request: object = None) -> AnswerParser:
        """Tells the reasoning in one answer from the rest, which is content.

        Raises RequestFailedError when the parser fails.
        """
        seen = request if isinstance(request, ChatCompletionRequest) else plugin_request(_fields(request))
        parser = make_reasoning_parser(self._cls, self._tokenizer, seen)
        return ReasoningPluginAnswer(
            parser,
            seen,
            self._tokenizer,
            AllContent(),
            streamed=bool(seen.stream),
            prompt_token_ids=self._prompt_ids(prompt),
        )

    def _encode(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(prompt, add_special_tokens=False)


def adjusted_by_plugins(
    parts: Iterable[object], request: ChatRequest, tools: Sequence[Mapping[str, Any]]
) -> ChatRequest:
    """The request as those of `parts` that are plug-ins want it.  Raises RequestFailedError when one fails."""
    changes: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, ToolPluginFormat | ReasoningPluginFormat):
            seen = plugin_request(request, tools).model_copy(update=changes)
            changes |= part.adjusted(seen)
    if not changes:
        return request
    said = request.model_dump(by_alias=True, exclude_unset=True)
    plain = {
        name: to_jsonable_python(value, by_alias=True, exclude_none=True) for name, value in changes.items()
    }
    return ChatRequest.model_validate({**said, **plain})


def tool_plugin_format(name: str, tokenizer: Tokenizer | None) -> ToolPluginFormat | None:
    """The tool parser that a plug-in registered under `name`, if one did.

    Raises ConfigError for one that cannot be imported, or made for this tokenizer.
    """
    registry = ToolParserManager.registry
    if tokenizer is None or not registry.has(name):
        return None
    return ToolPluginFormat(name, registry.found(name), plugin_tokenizer(tokenizer))


def reasoning_plugin_format(name: str, tokenizer: Tokenizer | None) -> ReasoningPluginFormat | None:
    """The reasoning parser that a plug-in registered under `name`, if one did.

    Raises ConfigError for one that cannot be imported, or made for this tokenizer.
    """
    registry = ReasoningParserManager.registry
    if tokenizer is None or not registry.has(name):
        return None
    return ReasoningPluginFormat(name, registry.found(name), plugin_tokenizer(tokenizer))


@lru_cache(maxsize=2)
def plugin_tokenizer(tokenizer: Tokenizer) -> PluginTokenizer:
    """The face of a tokenizer for plug-ins; one for all of them."""
    return PluginTokenizer(tokenizer)


def _fields(request: object) -> ChatRequest:
    assert isinstance(request, ChatRequest)
    return request


def _schema(request: ChatCompletionRequest) -> object:
    return get_json_schema_from_tools(request.tool_choice, request.tools, request.parallel_tool_calls)


def _strings(parser: ReasoningParser, *names: str) -> tuple[str, ...]:
    """The first of these attributes that is a text."""
    values = (getattr(parser, name, None) for name in names)
    return next(((value,) for value in values if isinstance(value, str) and value), ())
