"""Formats that write calls as JSON with little or nothing around it."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.elements import Element, InOrder, Many, Mark, Maybe, One, Space
from jaxserve.server.tool_parsers.grammar import GrammarWriter
from jaxserve.server.tool_parsers.json_calls import JsonArguments, JsonCall
from jaxserve.server.tool_parsers.reader import NAME_CHARACTERS, Reader, Steps
from jaxserve.server.tool_parsers.tool_format import ToolFormat

_ALPHANUMERIC = string.ascii_letters + string.digits

# Nothing but its keys tells that an object is a call.
_UNMARKED_CALL = JsonCall(only_known_keys=True, needs_arguments=True)


def _mistral_id(name: str, index: int) -> str:
    """Mistral's templates refuse ids of any other form."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(frozen=True)
class _MistralName:
    """The name, and the id if there is one, of a call in Mistral's later form: name[CALL_ID]…[ARGS]."""

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read up to the arguments."""
        call.begin()
        name = yield from reader.function_name()
        call_id = ""
        if (yield from reader.literal("[CALL_ID]")):
            call_id = yield from reader.match(NAME_CHARACTERS)
        yield from reader.literal("[ARGS]")
        yield from reader.white()
        call.start(name, call_id or None)

    def marks(self) -> Iterator[str]:
        """Those of the parts."""
        yield from ("[CALL_ID]", "[ARGS]")

    def lark(self, writer: GrammarWriter) -> str:
        """Without an id: the server gives one."""
        return writer.text(f"{writer.tool.name}[ARGS]")


@dataclass(frozen=True)
class _MistralCalls:
    """What follows [TOOL_CALLS]: a list of objects, or since the tokenizer's version 11 a name and its arguments."""

    early: Element
    late: Element

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read either form."""
        is_early = (yield from reader.white()) == "["
        yield from (self.early if is_early else self.late).read(reader, call)

    def marks(self) -> Iterator[str]:
        """Those of both forms."""
        yield from (*self.early.marks(), *self.late.marks())

    def lark(self, writer: GrammarWriter) -> str:
        """The form that the tokenizer has marks for."""
        return (self.late if writer.has_token("[ARGS]") else self.early).lark(writer)


FORMATS = (
    # Llama 3 and 4: {"name": …, "parameters": {…}}; {…}, sometimes behind <|python_tag|>
    ToolFormat(
        ("llama3_json", "llama4_json"),
        InOrder(
            Maybe("<|python_tag|>"),
            Space(),
            Many(
                JsonCall(("name",), ("parameters", "arguments"), only_known_keys=True, needs_arguments=True),
                separator=";",
                usual="; ",
            ),
        ),
        ("<|python_tag|>", "{"),
    ),
    # Mistral: [TOOL_CALLS] [{…}, {…}], later [TOOL_CALLS]f{…}[TOOL_CALLS]g{…} and [TOOL_CALLS]f[ARGS]{…}
    ToolFormat(
        ("mistral",),
        InOrder(
            Mark("[TOOL_CALLS]"),
            _MistralCalls(
                early=InOrder(Mark("["), Space(), Many(JsonCall(), end="]")),
                late=One(InOrder(_MistralName(), JsonArguments())),
            ),
        ),
        ("[TOOL_CALLS]",),
        between="",
        make_id=_mistral_id,
    ),
    # Salesforce xLAM: [{…}, {…}], sometimes in a block of code or behind a mark
    ToolFormat(
        ("xlam",),
        InOrder(
            Maybe("```json", "```", "[TOOL_CALLS]", "<tool_call>"),
            Space(),
            Mark("["),
            Space(),
            Many(_UNMARKED_CALL, end="]"),
            Space(),
            Maybe("```", "</tool_call>"),
        ),
        ("```", "[TOOL_CALLS]", "<tool_call>"),
        begins_at_start=("[",),
    ),
)
