"""Fields of a GGUF file's metadata that configs and tokenizers both read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError

_NO_TOKEN = 2**32 - 1  # -1 as the format's unsigned number: that there is none


def array_of(fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """An array's elements, empty where it is missing.  Raises CheckpointError for what is no array of `kind`."""
    value = fields.get(name, [])
    # The format has one type for all elements of an array.
    if not isinstance(value, list) or (value and not isinstance(value[0], kind)):
        raise CheckpointError(f"{name} is {value!r:.60}; it must be an array of {kind.__name__}")
    return value


def special_token(fields: Mapping[str, Any], role: str) -> int | None:
    """tokenizer.ggml.ROLE_token_id, None where there is no such token.  Raises CheckpointError for what is no id."""
    name = f"tokenizer.ggml.{role}_token_id"
    token_id = fields.get(name)
    if token_id is None or token_id == _NO_TOKEN:
        return None
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
        raise CheckpointError(f"{name} is {token_id!r:.60}; it must be a token id")
    return token_id
