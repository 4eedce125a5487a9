"""Reads SentencePiece tokenizer.model files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from jaxserve.errors import CheckpointError
from jaxserve.text.pieces import PieceType
from jaxserve.text.sentencepiece import SentencePieceModel


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model file (protocol buffer `ModelProto` of sentencepiece_model.proto).

    Raises:
        CheckpointError: the file is damaged, not SentencePiece, not BPE, or asks for text normalisation.
    """
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                entry = dict(_fields(value))
                pieces.append(bytes(entry[1]).decode())
                scores.append(struct.unpack("<f", bytes(entry.get(2, b"\0\0\0\0")))[0])
                types.append(int(entry.get(3, PieceType.NORMAL)))
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
    except (KeyError, IndexError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model, or damaged") from error
    if not pieces:
        raise CheckpointError(f"{path}: not a SentencePiece model, or damaged: no pieces in it")
    if trainer.get(3, 1) != 2:
        raise CheckpointError(
            f"{path}: SentencePiece model_type {trainer.get(3, 1)} is not supported, only BPE (2) is"
        )
    if normalizer.get(2):
        name = bytes(normalizer.get(1, b"")).decode(errors="replace")
        raise CheckpointError(f"{path}: SentencePiece normalizer {name!r} is not supported, only identity is")
    if normalizer.get(4, 1):
        raise CheckpointError(f"{path}: SentencePiece remove_extra_whitespaces is not supported")
    return SentencePieceModel(pieces, scores, types, add_dummy_prefix=bool(normalizer.get(3, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message: varints as int, everything else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("varint too long")
