"""How few tokens a text can have: never more than it has, and close to that."""

from __future__ import annotations

import random
from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.text.least_tokens import LeastTokens
from jaxserve.text.pieces import PieceType
from jaxserve.text.sentencepiece import SentencePieceModel, sentencepiece_backend
from jaxserve.text.spelling import spelling_of
from jaxserve.text.token_bytes import BYTE_LEVEL_ALPHABET, piece_decoder
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tokenizer_parts import TokenizerParts
from tests.tiny import byte_tokenizer

ADDED = ["<|end|>", "<b>", "ab"]


def byte_level(normalizer: normalizers.Normalizer | None = None, lost: str = "", **added: bool) -> Backend:
    """Byte-level BPE with some merges, without the bytes that `lost` stand for."""
    written = {byte: character for character, byte in BYTE_LEVEL_ALPHABET.items()}
    vocab = [written[byte] for byte in range(256) if written[byte] not in lost]
    merges = [
        ("a", "b"),
        ("ab", "c"),
        ("c", "a"),
        ("Ġ", "Ġ"),
        ("ĠĠ", "ĠĠ"),
        ("1", "2"),
        ("Ã", "©"),
        ("Ì", "ģ"),
    ]
    merges += [("=", "="), ("==", "=="), ("a", "a"), ("aa", "aa"), ("e", "Ì"), ("ä", "¸")]
    merges = [pair for pair in merges if not any(character in lost for character in "".join(pair))]
    vocab += ["".join(pair) for pair in merges]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(vocab)}, merges=merges))
    if normalizer is not None:
        backend.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]  # the stubs know no setter
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]  # likewise
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,2}|[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]  # likewise
    backend.add_tokens([AddedToken(text, normalized=False, **added) for text in ADDED])
    return backend


def sentencepiece() -> Backend:
    """SentencePiece BPE with its fallback to bytes."""
    words = ["▁", "a", "b", "c", "ab", "▁a", "▁ab", "▁▁", "▁▁▁▁", "é", "1", "aa"]
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [PieceType.UNKNOWN, PieceType.CONTROL, *[PieceType.BYTE] * 256, *[PieceType.NORMAL] * len(words)]
    return sentencepiece_backend(
        SentencePieceModel(pieces, [-float(i) for i in range(len(pieces))], types, True)
    )


KINDS = {
    "byte-level": byte_level(),
    "composing": byte_level(normalizers.NFC()),
    "bytes are lost": byte_level(lost="cĠÃ"),
    "sentencepiece": sentencepiece(),
}
TEXTS = st.text(
    st.sampled_from(
        "abc12=eé \n\0\u0301\u0327\u0338\u1100\u1161\u11a8が\u3099か\u212b中▁😀\U00011099\U000110ba<>|nd04x"
    ),
    max_size=80,
)


def fewest(data: bytes, pieces: set[bytes]) -> int:
    """By trying everything."""
    best = [0] + [len(data)] * len(data)
    for end in range(1, len(data) + 1):
        best[end] = 1 + min(
            best[start] for start in range(end) if end - start == 1 or data[start:end] in pieces
        )
    return best[-1]


@given(
    st.lists(st.binary(max_size=6).map(lambda data: bytes(byte % 3 for byte in data)), max_size=8),
    st.binary(max_size=40).map(lambda data: bytes(byte % 3 for byte in data)),
)
def test_no_fewer_pieces_of_tokens_have_the_bytes(tokens: list[bytes], data: bytes) -> None:
    pieces = {t[a:b] for t in tokens for a in range(len(t)) for b in range(a + 1, len(t) + 1)}
    assert LeastTokens(tokens).count([data], 1000) == fewest(data, pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size_of_slices", [5, 65536])
@given(text=TEXTS, added=st.lists(st.sampled_from(["", "<b>", "<|end|>", "<0x41>", "=="]), max_size=8))
def test_no_text_has_fewer_tokens(kind: str, size_of_slices: int, text: str, added: list[str]) -> None:
    text = "".join(part for pair in zip_longest(text, added, fillvalue="") for part in pair) + text
    spelling = spelling_of(KINDS[kind], piece_decoder(KINDS[kind]))
    assert spelling is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxserve.text.spelling._SLICE", size_of_slices)
        least = LeastTokens(spelling.tokens()).count(spelling.segments(text), 1_000_000)
    assert least <= len(KINDS[kind].encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_far_too_long_is_known_to_be(kind: str) -> None:
    tokenizer = Tokenizer(TokenizerParts(KINDS[kind]))
    for text in ("1" * 100_000, "ab=1" * 30_000, "中" * 100_000):
        assert tokenizer.least_tokens(text, 10_000) == 10_000
    assert tokenizer.least_tokens("1" * 70_000, 10_000) == 0  # it is no trouble to tokenize
    assert tokenizer.least_tokens("1" * 10_000, 500) == 0


def test_a_long_text_that_fits_is_let_through() -> None:
    tokenizer = Tokenizer(TokenizerParts(KINDS["byte-level"]))
    text = "<|end|>" * 20_000
    assert tokenizer.least_tokens(text, 15_000) == 15_000
    assert tokenizer.least_tokens(text + "x", 16_000) == 16_000
    spaces = " " * 90_000
    assert len(tokenizer.encode(spaces)) == 22_500
    assert 11_000 <= tokenizer.least_tokens(spaces, 11_200) <= 11_200


def test_close_to_what_a_text_has() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(random.Random(0).choices(["<|im_start|>", "a", "é"], k=30_000))
    exact = len(tokenizer.encode(text))
    assert 0.9 * exact <= tokenizer.least_tokens(text * 40, exact * 2) <= exact * 2


@pytest.mark.parametrize(
    "backend",
    [
        byte_level(normalizers.NFKC()),
        byte_level(normalizers.Strip()),
        byte_level(normalizers.Replace("a", "")),
        byte_level(rstrip=True),
        byte_level(lstrip=True),
    ],
    ids=["compatibility", "stripped", "replaced", "spaces after", "spaces before"],
)
def test_of_tokenizers_that_lose_text_nothing_is_said(backend: Backend) -> None:
    assert Tokenizer(TokenizerParts(backend)).least_tokens("1" * 100_000, 10) == 0


def test_a_splitter_that_removes_what_it_splits_at() -> None:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]  # the stubs know no setter
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    assert piece_decoder(backend)
    assert Tokenizer(TokenizerParts(backend)).least_tokens("1" * 100_000, 10) == 0
