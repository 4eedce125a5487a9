"""The calls of one answer while they are being read: what is said of them, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.server.parser_api.protocol import make_tool_call_id
from jaxserve.server.parsing.events import CallArguments, CallStart
from jaxserve.server.tool_parsers.reader import Reader

# A call is announced when it is complete.  When so many characters of its arguments have come and were in
# order, it is announced before, so that who writes a long file by a call is seen writing.
HELD_CHARACTERS = 1000


def uuid_id(name: str, index: int) -> str:
    """The id that vLLM gives a call."""
    return make_tool_call_id()


class CallDraft:
    """Where a format puts what it reads.

    For each call: `begin`, `start` when the name is known, `add` for arguments, `end`.  What is called at a
    place of the text must depend on the text before that place alone, not on where it was cut into pieces.
    """

    def __init__(
        self,
        reader: Reader,
        announce: Callable[[CallStart | CallArguments], None],
        tools: Sequence[Mapping[str, Any]],
        make_id: Callable[[str, int], str],
        held_characters: int,
    ) -> None:
        self._reader = reader
        self._announce = announce
        self._schemas = {f["name"]: f.get("parameters") or {} for f in map(_function, tools) if "name" in f}
        self._make_id = make_id
        self._held_characters = held_characters
        self.num_ended = 0
        self.is_open = False  # a call has begun and not ended
        self.is_announced = False  # the open call is
        self._start: CallStart | None = None
        self._ids: set[str] = set()
        self._arguments: list[str] = []  # not announced
        self._num_characters = 0

    def schema(self, name: str) -> Mapping[str, Any]:
        """The JSON schema of a function's arguments; empty for a function that nobody offered."""
        return self._schemas.get(name, {})

    def begin(self) -> None:
        """A call begins, whose name is not known yet."""
        self.drop()
        self.is_open = True

    def start(self, name: str, call_id: str | None = None) -> None:
        """The open call's name is `name`; `call_id` is what the model itself calls it, if it does."""
        index = self.num_ended
        if not call_id or call_id in self._ids:
            call_id = self._make_id(name, index)
        self._start = CallStart(index, call_id, name)
        self._announce_if_due()

    def add(self, text: str) -> None:
        """More of the open call's arguments, as JSON text; `start` came before."""
        self._arguments.append(text)
        self._num_characters += len(text)
        self._announce_if_due()

    def end(self) -> None:
        """The open call is complete.  One without arguments gets `{}`."""
        if not self._num_characters:
            self._arguments.append("{}")
        self._announce_now()
        self._forget()
        self.num_ended += 1

    def drop(self) -> None:
        """The open call does not go on.  If it was announced, it stays with the arguments that came."""
        if self.is_announced:
            self.num_ended += 1
        self._forget()

    def _announce_if_due(self) -> None:
        if self.is_announced or self._num_characters >= self._held_characters:
            self._announce_now()

    def _announce_now(self) -> None:
        assert self._start is not None
        if not self.is_announced:
            self._announce(self._start)
            self._ids.add(self._start.id)
            self.is_announced = True
        if self._arguments:
            self._announce(CallArguments(self._start.index, "".join(self._arguments)))
            self._arguments.clear()
        self._reader.settle()

    def _forget(self) -> None:
        self.is_open = self.is_announced = False
        self._start = None
        self._arguments.clear()
        self._num_characters = 0


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else {}
