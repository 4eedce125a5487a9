"""Which bytes of a text are sure to be found again in its tokens, whatever becomes of the rest."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxserve.text.token_bytes import BYTE_LEVEL_ALPHABET, PieceDecoder

SPACE = "▁"  # SentencePiece's; a text that has it itself becomes the same tokens
_SLICE = 65536  # characters that are looked at at a time


class Spelling:
    """A tokenizer whose tokens, one after the other, have the bytes of the text.

    Stretches of it, that is: Unicode normalisation (NFC) may join characters, bytes that the vocabulary lacks are lost,
    and spaces may be put in front.
    """

    def __init__(
        self, backend: Backend, pieces: PieceDecoder, *, lost: bytes, is_byte_level: bool, composes: bool
    ) -> None:
        self._backend = backend
        self._pieces = pieces
        self._lost = re.compile(b"[" + re.escape(lost) + b"]+") if lost else None
        self._is_byte_level = is_byte_level
        self._composes = composes

    def tokens(self) -> set[bytes]:
        """The bytes of a text that each token may stand for."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        tokens = {self._pieces.to_bytes(piece) for piece in vocab}
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        return tokens | {self._written(piece) for piece in (added if self._is_byte_level else vocab)}

    def segments(self, text: str) -> Iterator[bytes]:
        """Stretches of `text` whose bytes are found again, one after the other, in its tokens."""
        for start in range(0, len(text), _SLICE):
            for stretch in self._stable(text[start : start + _SLICE]):
                written = self._written(stretch)
                if self._lost is None:
                    yield written
                else:
                    yield from self._lost.split(written)

    def _stable(self, text: str) -> list[str]:
        if not self._composes:
            return [text]
        stretches = (text if text.isascii() else text.translate(_Unstable())).split(_GAP)
        # The last character before a gap, or the text's, may be joined with what comes after it.
        return [stretch[:-1] for stretch in stretches]

    def _written(self, text: str) -> bytes:
        return (text if self._is_byte_level else text.replace(SPACE, " ")).encode("utf-8", "surrogatepass")


def spelling_of(backend: Backend, pieces: PieceDecoder) -> Spelling | None:
    """The spelling of a tokenizer; None for one of which it is not certain that none of a text is lost.

    Tokenizers of today's language models are byte-level BPE, or SentencePiece's BPE with its fallback to bytes.
    """
    model = backend.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    normalizers = _steps(backend.normalizer, "normalizers")
    splitters = _steps(backend.pre_tokenizer, "pretokenizers")
    is_byte_level = any(step["type"] == "ByteLevel" for step in splitters)
    if is_byte_level != any(step["type"] == "ByteLevel" for step in _steps(backend.decoder, "decoders")):
        return None
    lost = bytes(byte for single, byte in BYTE_LEVEL_ALPHABET.items() if model.token_to_id(single) is None)
    if not is_byte_level:
        lost = b""
        # Without one of these, characters with that byte would become an unknown token, many of them one together.
        has_all = all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
        if not (model.byte_fallback and has_all):
            return None
    if not (all(map(_keeps_text, normalizers)) and all(map(_only_splits, splitters))):
        return None
    composes = any(step["type"] == "NFC" for step in normalizers)
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip:  # takes any number of spaces with it
            return None
        if composes and _GAP in token.content.translate(_Unstable()):
            return None
    return Spelling(backend, pieces, lost=lost, is_byte_level=is_byte_level, composes=composes)


_GAP = "\0"


class _Unstable(dict[int, int]):
    """For str.translate: characters that NFC may change or join with the one before become gaps."""

    def __missing__(self, code: int) -> int:
        character = chr(code)
        is_stable = (
            unicodedata.category(character)[0] != "M"  # marks; most are joined
            and unicodedata.category(character) != "Cn"  # newer than Python's tables
            and not 0x1100 <= code < 0x1200  # parts of Hangul syllables
            and not 0x10000 <= code < 0x1F000  # vowel signs of scripts that are letters there
            and unicodedata.normalize("NFC", character) == character
        )
        self[code] = code if is_stable else ord(_GAP)
        return self[code]


def _steps(component: Any, name: str) -> list[dict[str, Any]]:
    """What tokenizer.json says of a normalizer, pre-tokenizer or decoder: its steps, those of sequences one by one."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())

    def flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if step["type"] == "Sequence":
            for inner in step[name]:
                yield from flat(inner)
        else:
            yield step

    return list(flat(state))


def _keeps_text(normalizer: dict[str, Any]) -> bool:
    kind = normalizer["type"]
    writes_spaces = (
        kind == "Replace" and normalizer["pattern"] == {"String": " "} and normalizer["content"] == SPACE
    )
    return kind in ("NFC", "Prepend") or writes_spaces


def _only_splits(splitter: dict[str, Any]) -> bool:
    kind = splitter["type"]
    if kind == "Metaspace":
        return splitter["replacement"] == SPACE
    return kind in ("ByteLevel", "Digits") or (kind == "Split" and splitter["behavior"] != "Removed")
