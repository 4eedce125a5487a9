"""Vocabularies as GGUF and SentencePiece list them: a text and a type for each token id."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from tokenizers import AddedToken

from jaxserve.errors import CheckpointError


class PieceType(IntEnum):
    """What a piece is for; the numbers are SentencePiece's and those of tokenizer.ggml.token_type."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def vocabulary(pieces: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Ids by text.  Unused and empty pieces only fill the numbering, and no text has them.

    Raises:
        CheckpointError: a piece is there twice.
    """
    vocab: dict[str, int] = {}
    for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if not piece or kind == PieceType.UNUSED:
            continue
        if piece in vocab:
            raise CheckpointError(
                f"tokenizer: {piece!r} is in the vocabulary twice, as {vocab[piece]} and {i}"
            )
        vocab[piece] = i
    return vocab


def added_tokens(pieces: Sequence[str], types: Sequence[int]) -> list[AddedToken]:
    """The pieces found in raw text before anything is merged: control tokens and user-defined ones."""
    return [
        AddedToken(piece, special=kind == PieceType.CONTROL, normalized=False)
        for piece, kind in zip(pieces, types, strict=True)
        if piece and kind in (PieceType.CONTROL, PieceType.USER_DEFINED)
    ]
