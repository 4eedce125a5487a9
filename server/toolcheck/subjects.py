"""The parsers that can be checked, built-in ones and plug-ins', behind one face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxserve.errors import ConfigError, RequestFailedError
from jaxserve.server.parser_api.abstract import ToolParser, ToolParserManager
from jaxserve.server.parsing.answer_format import make_answer_format
from jaxserve.server.parsing.events import AnswerParser
from jaxserve.server.plugins.answers import ToolPluginAnswer, make_tool_parser
from jaxserve.server.plugins.formats import plugin_tokenizer
from jaxserve.server.plugins.load import Plugin
from jaxserve.server.plugins.request import adjusted, plugin_request
from jaxserve.server.tool_parsers.registry import find_tool_parser
from jaxserve.server.toolcheck.byte_tokenizer import ProbingTokenizer, byte_tokenizer
from jaxserve.text.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]


class Subject(Protocol):
    """A parser that is checked."""

    name: str
    tokenizer: Tokenizer
    streams_alike: bool  # whole answers go through the same code as streamed ones
    keeps_arguments: bool  # arguments are the same text in both; else the same JSON

    def parser(self, tools: Tools, *, streamed: bool) -> AnswerParser:
        """A fresh parser for one answer."""
        ...


class BuiltIn:
    """A built-in format.  Raises ConfigError, listing the names, for one that is none."""

    streams_alike = True
    keeps_arguments = True

    def __init__(self, name: str, tokenizer: Tokenizer | None) -> None:
        find_tool_parser(name)
        self.name = name
        self.tokenizer = tokenizer or byte_tokenizer()
        self._format = make_answer_format(name, None)

    def parser(self, tools: Tools, *, streamed: bool) -> AnswerParser:
        """The same for both."""
        return self._format.parser(tools=tools, tokenizer=self.tokenizer)


class PlugIn:
    """A plug-in's parser, called with pieces of any size.

    Raises ConfigError for a class that cannot be made, or that fails on every request.
    """

    streams_alike = False

    def __init__(
        self, name: str, cls: type[ToolParser], tokenizer: Tokenizer | None, *, exact: bool = False
    ) -> None:
        self.name = name
        self.keeps_arguments = exact
        self._cls = cls
        try:
            if tokenizer is None:
                probe = ProbingTokenizer()
                make_tool_parser(cls, probe, plugin_request({"messages": []}))
                tokenizer = byte_tokenizer(probe.tags)
            self.tokenizer = tokenizer
            self._face = plugin_tokenizer(tokenizer)
            make_tool_parser(cls, self._face, plugin_request({"messages": []}))
        except RequestFailedError as error:
            raise ConfigError(str(error)) from error

    def parser(self, tools: Tools, *, streamed: bool) -> AnswerParser:
        """As the server makes it, but for the pieces."""
        request = plugin_request({"messages": [], "tools": tools, "stream": streamed})
        request = request.model_copy(
            update=adjusted(make_tool_parser(self._cls, self._face, request), request)
        )
        parser = make_tool_parser(self._cls, self._face, request)
        return ToolPluginAnswer(parser, request, self._face, streamed=streamed, by_token=False)


def plugin_subjects(
    plugin: Plugin, names: Sequence[str], tokenizer: Tokenizer | None, *, exact: bool
) -> list[PlugIn]:
    """The parsers of a plug-in: those of these names, or all of them.

    A file that registers none is checked by the classes that it defines.  Raises ConfigError for other names, and
    for a plug-in without parsers.
    """
    file = Path(plugin.module.__file__ or plugin.module.__name__).name
    classes = {name: ToolParserManager.registry.found(name) for name in plugin.tool_parsers}
    classes = classes or {cls.__name__: cls for cls in plugin.parser_classes()}
    if not classes:
        raise ConfigError(
            f"{file} has no tool parser: derive a class from ToolParser and register it, with "
            '@ToolParserManager.register_module("name")'
        )
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ConfigError(f"{file} has no tool parser {unknown[0]!r}; it has {', '.join(classes)}")
    first_names: dict[type[ToolParser], str] = {}
    for name, cls in classes.items():
        first_names.setdefault(cls, name)
    return [PlugIn(name, classes[name], tokenizer, exact=exact) for name in names or first_names.values()]
