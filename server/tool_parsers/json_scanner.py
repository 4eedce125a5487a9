"""Where a JSON value ends, told while its text is still coming, and whether it is JSON at all."""

from __future__ import annotations

import re

_STRING_BODY = re.compile(r'[^"\\\x00-\x1f]*')
_WHITE = re.compile(r"[ \t\n\r]*")
_NUMBER_BODY = re.compile(r"[0-9+\-.eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = frozenset('"\\/bfnrt')

# What may come next.
_VALUE, _FIRST_ITEM, _FIRST_KEY, _KEY, _COLON, _AFTER = range(6)
_STRING, _ESCAPE, _HEX_DIGIT, _NUMBER_PART, _LITERAL, _DONE = range(6, 12)


class BadJsonError(ValueError):
    """The text cannot be the beginning of a JSON value; everything before `position` could."""

    def __init__(self, position: int) -> None:
        super().__init__(f"not JSON at character {position}")
        self.position = position


class JsonScanner:
    """Follows one JSON value (RFC 8259, nothing looser) through its text, in pieces of any size."""

    def __init__(self) -> None:
        self._expects = _VALUE
        self._open: list[str] = []  # the brackets that wait for their end
        self._is_key = False  # the string that is being read is a key
        self._hex_left = 0
        self._rest = ""  # of a literal
        self._number: list[str] = []

    @property
    def is_done(self) -> bool:
        """Whether the value is complete.  A number is complete only when something else follows it."""
        return self._expects == _DONE

    def scan(self, text: str, position: int = 0) -> int:
        """Read on; the position behind the value, or the text's length when the value goes on.

        Raises BadJsonError at the first character that cannot belong to JSON.
        """
        end = len(text)
        while position < end and self._expects != _DONE:
            expects = self._expects
            if expects == _STRING:
                position = self._string(text, position)
            elif expects in (_ESCAPE, _HEX_DIGIT, _LITERAL):
                self._single(text[position], position)
                position += 1
            elif expects == _NUMBER_PART:
                position = self._number_part(text, position)
            else:
                match = _WHITE.match(text, position)
                assert match is not None
                position = match.end()
                if position < end:
                    position = self._structure(text[position], position)
        return position

    def _string(self, text: str, position: int) -> int:
        match = _STRING_BODY.match(text, position)
        assert match is not None
        position = match.end()
        if position == len(text):
            return position
        if text[position] == '"':
            self._expects = _COLON if self._is_key else self._after_value()
        elif text[position] == "\\":
            self._expects = _ESCAPE
        else:
            raise BadJsonError(position)
        return position + 1

    def _single(self, character: str, position: int) -> None:
        """One character inside an escape or a literal."""
        if self._expects == _ESCAPE and character == "u":
            self._expects, self._hex_left = _HEX_DIGIT, 4
        elif self._expects == _ESCAPE and character in _ESCAPES:
            self._expects = _STRING
        elif self._expects == _HEX_DIGIT and character in _HEX:
            self._hex_left -= 1
            self._expects = _HEX_DIGIT if self._hex_left else _STRING
        elif self._expects == _LITERAL and character == self._rest[0]:
            self._rest = self._rest[1:]
            self._expects = _LITERAL if self._rest else self._after_value()
        else:
            raise BadJsonError(position)

    def _number_part(self, text: str, position: int) -> int:
        match = _NUMBER_BODY.match(text, position)
        assert match is not None
        self._number.append(match[0])
        if match.end() < len(text):
            if not _NUMBER.fullmatch("".join(self._number)):
                raise BadJsonError(match.end())
            self._number.clear()
            self._expects = self._after_value()
        return match.end()

    def _structure(self, character: str, position: int) -> int:
        """Anything outside strings, numbers and literals; the position to go on at."""
        expects = self._expects
        if expects in (_VALUE, _FIRST_ITEM) and character != "]":
            return self._value(character, position)
        if expects == _FIRST_ITEM:
            self._close()
        elif expects in (_FIRST_KEY, _KEY) and character == '"':
            self._expects, self._is_key = _STRING, True
        elif expects == _COLON and character == ":":
            self._expects = _VALUE
        elif expects == _AFTER and character == ",":
            self._expects = _KEY if self._open[-1] == "{" else _VALUE
        elif (expects == _FIRST_KEY and character == "}") or (
            expects == _AFTER and character == ("}" if self._open[-1] == "{" else "]")
        ):
            self._close()
        else:
            raise BadJsonError(position)
        return position + 1

    def _value(self, character: str, position: int) -> int:
        if character == '"':
            self._expects, self._is_key = _STRING, False
        elif character in "{[":
            self._open.append(character)
            self._expects = _FIRST_KEY if character == "{" else _FIRST_ITEM
        elif character in _LITERALS:
            self._expects, self._rest = _LITERAL, _LITERALS[character][1:]
        elif character in "-0123456789":
            self._expects = _NUMBER_PART
            return position  # it belongs to the number
        else:
            raise BadJsonError(position)
        return position + 1

    def _close(self) -> None:
        self._open.pop()
        self._expects = self._after_value()

    def _after_value(self) -> int:
        return _AFTER if self._open else _DONE


def is_json(text: str) -> bool:
    """Whether a text is one JSON value, and nothing else but white space."""
    scanner = JsonScanner()
    try:
        end = scanner.scan(text + " ")
    except BadJsonError:
        return False
    return scanner.is_done and not text[end:].strip(" \t\n\r")
