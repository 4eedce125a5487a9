"""Text as it comes, read by generators that pause where it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from jaxserve.server.tool_parsers.json_scanner import BadJsonError, JsonScanner

Result = TypeVar("Result")
# Reads on until it knows its result; yields when it needs more text.
Steps = Generator[None, None, Result]

WHITE = re.compile(r"\s*")
NAME_CHARACTERS = re.compile(r"[\w.\-]*")
_FUNCTION_NAME = re.compile(r"[^\W\d][\w.\-]*")


class NoCallError(Exception):
    """What is being read is no tool call after all."""


class Reader:
    """The text that has come, and how far it was read.

    What was read since the last `settle` is kept, to be given back if it turns out to be no call.  Every
    character is copied a bounded number of times, however small the pieces are.
    """

    def __init__(self) -> None:
        self.text = ""
        self.position = 0  # how far `text` was read
        self._settled = 0  # up to here `text` is accounted for
        self._kept: list[str] = []  # read and not settled, before `text`

    def feed(self, text: str) -> None:
        """More text has come."""
        if self._settled < self.position:
            self._kept.append(self.text[self._settled : self.position])
        self.text = self.text[self.position :] + text
        self.position = self._settled = 0

    def settle(self) -> None:
        """What was read is accounted for."""
        self._kept.clear()
        self._settled = self.position

    def give_back(self) -> str:
        """The text that was read and is not accounted for; it is from now on."""
        text = "".join(self._kept) + self.text[self._settled : self.position]
        self.settle()
        return text

    def rest(self) -> str:
        """All text that is not accounted for, read or not; it is from now on."""
        read = self.give_back()
        rest, self.position = self.text[self.position :], len(self.text)
        self.settle()
        return read + rest

    def peek(self) -> Steps[str]:
        """The next character."""
        while self.position == len(self.text):
            yield
        return self.text[self.position]

    def white(self) -> Steps[str]:
        """Read white space, which may be none; the next character is then at hand.  Returns that character."""
        while True:
            match = WHITE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text):
                return self.text[self.position]
            yield

    def literal(self, literal: str) -> Steps[bool]:
        """Read `literal` if it comes next; otherwise read nothing."""
        while not self.text.startswith(literal, self.position):
            num_there = len(self.text) - self.position
            if num_there >= len(literal) or not literal.startswith(self.text[self.position :]):
                return False
            yield
        self.position += len(literal)
        return True

    def expect(self, literal: str) -> Steps[None]:
        """Read `literal`, or raise NoCallError."""
        if not (yield from self.literal(literal)):
            raise NoCallError(f"{literal!r} is missing")

    def match(self, characters: re.Pattern[str]) -> Steps[str]:
        """Read characters for as long as they match; `characters` matches runs of any length, of none too."""
        pieces: list[str] = []
        while True:
            match = characters.match(self.text, self.position)
            assert match is not None
            pieces.append(match[0])
            self.position = match.end()
            if self.position < len(self.text):
                return "".join(pieces)
            yield

    def run(self, characters: re.Pattern[str], sink: Callable[[str], None]) -> Steps[str]:
        """Give characters to `sink` for as long as they match, as they come; the next character, not read."""
        while True:
            match = characters.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if match[0]:
                sink(match[0])
            if self.position < len(self.text):
                return self.text[self.position]
            yield

    def take(self, length: int) -> Steps[str]:
        """Read so many characters."""
        while len(self.text) - self.position < length:
            yield
        self.position += length
        return self.text[self.position - length : self.position]

    def until(self, marks: re.Pattern[str], longest: int, sink: Callable[[str], None]) -> Steps[str]:
        """Give the text before the first of some marks to `sink`, piece by piece; read the mark and return it.

        `longest` is the length of the longest mark: so much text is held back, less one character.
        """
        while True:
            match = marks.search(self.text, self.position)
            end = match.start() if match else max(self.position, len(self.text) - longest + 1)
            piece = self.text[self.position : end]
            self.position = end
            if piece:
                sink(piece)
            if match:
                self.position = match.end()
                return match[0]
            yield

    def up_to(self, marks: Sequence[str], sink: Callable[[str], None]) -> Steps[str]:
        """Like `until`, for literals: text is held back only where it may be the beginning of one.

        No literal may stand inside another one but at its end.
        """
        found = re.compile("|".join(map(re.escape, marks)))
        longest = max(map(len, marks))
        while True:
            match = found.search(self.text, self.position)
            end = match.start() if match else len(self.text)
            if match is None:
                tails = (self.text[start:] for start in range(max(self.position, end - longest + 1), end))
                end -= next((len(tail) for tail in tails if any(mark.startswith(tail) for mark in marks)), 0)
            piece = self.text[self.position : end]
            self.position = end
            if piece:
                sink(piece)
            if match:
                self.position = match.end()
                return match[0]
            yield

    def json(self, sink: Callable[[str], None]) -> Steps[None]:
        """Read a JSON value, giving its text to `sink` piece by piece.  NoCallError where it stops being JSON."""
        scanner = JsonScanner()
        while True:
            start = self.position
            try:
                self.position = scanner.scan(self.text, start)
            except BadJsonError as error:
                self.position = error.position
            is_bad = not scanner.is_done and self.position < len(self.text)
            if start < self.position:
                sink(self.text[start : self.position])
            if is_bad:
                raise NoCallError("the arguments are not JSON")
            if scanner.is_done:
                return
            yield

    def function_name(self) -> Steps[str]:
        """Read the name of a function, or raise NoCallError."""
        return checked_function_name((yield from self.match(NAME_CHARACTERS)))


def checked_function_name(name: str) -> str:
    """The name, or NoCallError if no function can be called so."""
    if not _FUNCTION_NAME.fullmatch(name):
        raise NoCallError(f"{name!r} is no function's name")
    return name
