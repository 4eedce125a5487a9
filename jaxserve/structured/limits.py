"""How large a constraint may be, so that none holds the server up: llguidance bounds its own work only in part."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from jaxserve.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_CHARACTERS = 1 << 20  # of a schema, a grammar, all choices
MAX_REGEX_CHARACTERS = 1 << 16
MAX_GBNF_CHARACTERS = 1 << 16  # its translation is Python, which takes a second for so many
# Of a text that must be written exactly so: a matcher looks at it from end to end, a microsecond a character, and the
# step loop waits for it.
MAX_LITERAL_CHARACTERS = 1 << 14
MAX_REPETITIONS = 1 << 16  # {n} in a regex
# Of one Lark text.  Terminals are put together into one automaton, which takes time in the square of their number
# where they are nested; a second for a thousand.
MAX_TERMINALS = 1000
MAX_SECONDS = 2.0  # of processor time to compile one
# What compiling may need at its deepest: about 4 KiB for each reference that leads to the next, of which a text of
# MAX_CHARACTERS has room for some 20,000.  Address space, which becomes memory where it is used.
STACK_BYTES = 256 << 20

_REPETITION = re.compile(r"\{(?:\d*,)?(\d+),?\}")
# Written so that no two neighbours match the same character: a search takes time in the length of the text alone.
_LONG_STRING = re.compile(rf'"(?:[^"\\\n]|\\.){{{MAX_LITERAL_CHARACTERS},}}')
_DEFINITION = re.compile(
    r"^[ \t]*[?!]?_*[A-Z][A-Z0-9_-]*[ \t]*(?:(?:\[[^\]\n]*\]|\.\d+)[ \t]*)?:", re.MULTILINE
)


def check_length(what: str, *texts: str) -> None:
    """Refuse what is longer than the limit for its kind.  Raises RequestError."""
    limit = {"regex": MAX_REGEX_CHARACTERS, "GBNF grammar": MAX_GBNF_CHARACTERS}.get(what, MAX_CHARACTERS)
    length = sum(map(len, texts))
    if length > limit:
        raise RequestError(f"the {what} has {length} characters; at most {limit} are taken.")


def check_literals(*texts: str) -> None:
    """Refuse a text that an answer would have to repeat and that is longer than any answer.  Raises RequestError."""
    length = max(map(len, texts), default=0)
    if length > MAX_LITERAL_CHARACTERS:
        raise RequestError(
            f"a text that must be written exactly so has {length} characters; at most "
            f"{MAX_LITERAL_CHARACTERS} are taken."
        )


def check_regex(pattern: str) -> None:
    """Refuse a regular expression that is too long, or counts too far.  Raises RequestError."""
    check_length("regex", pattern)
    most = max((int(count[:20]) for count in _REPETITION.findall(pattern)), default=0)
    if most > MAX_REPETITIONS:
        raise RequestError(f"the regex repeats something {most} times; at most {MAX_REPETITIONS} are taken.")


def check_lark(text: str) -> None:
    """Refuse a Lark text with too many terminals, or too long a string.  Raises RequestError."""
    if (found := _LONG_STRING.search(text)) is not None:
        check_literals(found[0])
    count = sum(1 for _ in _DEFINITION.finditer(text))
    if count > MAX_TERMINALS:
        raise RequestError(f"the grammar defines {count} terminals; at most {MAX_TERMINALS} are taken.")


@cache
def parser_limits() -> LLParserLimits:
    """llguidance's own limits: its defaults, but for the size of automata, which live as long as the grammar is kept.

    32,768 states take some 25 MB.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=1 << 15, verbose_errors=False)
