"""SentencePiece BPE tokenizers built from pieces and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from jaxserve.text.pieces import PieceType, added_tokens, vocabulary

SPACE = "▁"  # how a piece writes a space


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A vocabulary: row i of the three lists is token id i."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    add_dummy_prefix: bool  # a space is put before the text


def sentencepiece_backend(model: SentencePieceModel) -> Backend:
    """A tokenizer that encodes as SentencePiece does.  Raises CheckpointError for a piece given twice."""
    vocab = vocabulary(model.pieces, model.types)
    unknown = [model.pieces[i] for i, kind in enumerate(model.types) if kind == PieceType.UNKNOWN]
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges(model),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=PieceType.BYTE in model.types,
        )
    )
    write_spaces = normalizers.Replace(" ", SPACE)
    read_spaces = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), write_spaces])
        backend.decoder = decoders.Sequence([*read_spaces, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = write_spaces
        backend.decoder = decoders.Sequence(read_spaces)
    backend.add_tokens(added_tokens(model.pieces, model.types))
    if unknown:
        backend.add_special_tokens([AddedToken(unknown[0], special=True, normalized=False)])
    return backend


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first, as SentencePiece chooses."""
    ids = {
        p: i
        for i, (p, kind) in enumerate(zip(model.pieces, model.types, strict=True))
        if kind == PieceType.NORMAL
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-model.scores[i], left, right, piece[:cut], piece[cut:]))
    ranked.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in ranked]
