"""Typed look-ups in a checkpoint's metadata, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from jaxserve.errors import CheckpointError

T = TypeVar("T")

MOST = 2**31 - 1  # nothing in a model is counted further
_LARGEST = 1e30  # float32, in which models count, does not reach much further
MAX_LAYERS = 1000  # what is said of each layer is written down before the whole is looked at


class Fields:
    """A mapping read from `where`.  A getter without `absent` refuses a key that is missing or null.

    Give `absent` only where the file format itself says what a missing key means.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, message: str) -> CheckpointError:
        """A CheckpointError that begins with where this came from."""
        return CheckpointError(f"{self.where}: {message}")

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def integer(self, key: str, *, absent: int | None = None, least: int = -MOST, most: int = MOST) -> int:
        value = self._get(key, absent)
        if not _is_whole(value):
            raise self.error(f"{key} is {value!r}; it must be a whole number")
        if value < least:
            raise self.error(f"{key} is {value}; it must be at least {least}")
        if value > most:
            raise self.error(f"{key} is {value}; it must be at most {most}")
        return int(value)

    def number(self, key: str, *, absent: float | None = None) -> float:
        value = self._get(key, absent)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self.error(f"{key} is {value!r}; it must be a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not abs(number) <= _LARGEST:
            raise self.error(f"{key} is {value!r:.60}; it must be a number, and at most {_LARGEST}")
        return number

    def boolean(self, key: str, *, absent: bool | None = None) -> bool:
        return self._of_type(bool, "true or false", key, absent)

    def string(self, key: str, *, absent: str | None = None) -> str:
        return self._of_type(str, "a string", key, absent)

    def strings(self, key: str) -> list[str]:
        value = self._of_type(list, "a list of strings", key, None)
        if not all(isinstance(item, str) for item in value):
            raise self.error(f"{key} is {value!r}; it must be a list of strings")
        return value

    def integers(self, key: str) -> list[int]:
        value = self._of_type(list, "a list of whole numbers", key, None)
        if not all(_is_whole(item) and -MOST <= item <= MOST for item in value):
            raise self.error(f"{key} is {value!r}; it must be a list of whole numbers, each at most {MOST}")
        return [int(item) for item in value]

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them as a tuple, empty where the key is missing or null."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(_is_whole(item) and 0 <= item <= MOST for item in ids):
            raise self.error(f"{key} is {value!r}; it must be a token id or a list of them")
        return tuple(int(item) for item in ids)

    def _of_type(self, kind: type[T], wants: str, key: str, absent: T | None) -> T:
        value = self._get(key, absent)
        if not isinstance(value, kind):
            raise self.error(f"{key} is {value!r}; it must be {wants}")
        return value

    def _get(self, key: str, absent: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = absent
        if value is None:
            raise self.error(f"required key {key} is missing")
        return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
