"""The bytes each token stands for, worked out from what the tokenizer's decoder says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from jaxserve.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """How a token's written form becomes bytes.

    `to_bytes` is for ordinary pieces, `added_to_bytes` for added tokens (whose content is plain text).  The
    text as a whole loses up to `strip_start` leading spaces: SentencePiece puts one in front of everything.
    """

    to_bytes: Callable[[str], bytes]
    added_to_bytes: Callable[[str], bytes]
    strip_start: int


def piece_decoder(backend: Backend) -> PieceDecoder:
    """Read the decoder of a `tokenizers` tokenizer.

    Bytes per token, rather than the library's own decode over a window of tokens, make incremental decoding
    exact: whether a character is complete, unfinished or invalid is a question about bytes alone.

    Raises:
        CheckpointError: the decoder is neither byte-level BPE nor SentencePiece-like.
    """
    if backend.decoder is None:
        raise CheckpointError(
            "tokenizer: it has no decoder; byte-level BPE and SentencePiece decoders are supported"
        )
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return PieceDecoder(_byte_level_bytes, _utf8, 0)
    return _sentencepiece_decoder(steps)


def _sentencepiece_decoder(steps: list[dict[str, Any]]) -> PieceDecoder:
    replacements: list[tuple[str, str]] = []
    strip_start, has_byte_fallback, is_fused = 0, False, False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            strip_start = 0 if step.get("prepend_scheme") == "never" else 1
        elif kind == "ByteFallback":
            has_byte_fallback = True
        elif kind == "Fuse":
            is_fused = True
        elif kind == "Strip" and is_fused and step["content"] == " " and step["stop"] == 0:
            strip_start = step["start"]
        else:
            raise CheckpointError(
                f"tokenizer: decoder step {json.dumps(step, ensure_ascii=False)} is not supported; "
                "byte-level BPE and SentencePiece decoders are"
            )

    def to_bytes(piece: str) -> bytes:
        if has_byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes((int(piece[3:5], 16),))
            except ValueError:
                pass  # an ordinary piece that happens to look alike
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return PieceDecoder(to_bytes, to_bytes, strip_start)


def _utf8(text: str) -> bytes:
    return text.encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_table()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([BYTE_LEVEL_ALPHABET[character] for character in piece])
    except KeyError:  # not written in the alphabet: the library takes such a piece literally, and so do we
        return piece.encode()
