"""Byte-level BPE tokenizers out of GGUF metadata."""

from typing import Any

import pytest
from tokenizers import pre_tokenizers

from jaxserve.errors import CheckpointError
from jaxserve.text.byte_level import PRE_TOKENIZERS, byte_level_backend
from jaxserve.text.token_bytes import BYTE_LEVEL_ALPHABET
from jaxserve.text.tokenizer import tokenizer_from_gguf

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TOKENS = [*BYTE_LEVEL_ALPHABET, "he", "hel", "<|end|>", "<think>", "[PAD]"]


def fields(**changes: Any) -> dict[str, Any]:
    base = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": TOKENS,
        "token_type": [NORMAL] * 258 + [CONTROL, USER_DEFINED, UNUSED],
        "merges": ["h e", "he l"],
        "eos_token_id": 258,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (base | changes).items() if v is not None}


def pieces(pre: str, text: str) -> list[str]:
    """How a pre-tokenizer cuts a text, in plain text again."""
    backend = byte_level_backend(dict(BYTE_LEVEL_ALPHABET), [], PRE_TOKENIZERS[pre])
    assert isinstance(backend.pre_tokenizer, pre_tokenizers.PreTokenizer)
    cuts = backend.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(BYTE_LEVEL_ALPHABET[c] for c in piece).decode() for piece, _ in cuts]


def test_merges_added_tokens_and_padding() -> None:
    tokenizer = tokenizer_from_gguf(fields())
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello<|end|><think>")) == [
        "hel",
        "l",
        "o",
        "<|end|>",
        "<think>",
    ]
    assert tokenizer.special_ids == {258}
    assert tokenizer.added_ids == {258, 259}
    assert tokenizer.vocab_size == 260
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.id_to_token(260) is None


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("gpt-2", "It's 1234 ok  x\n\ny", ["It", "'s", " 1234", " ok", " ", " x", "\n", "\n", "y"]),
        ("smollm", "a 1234  x", ["a", " ", "1", "2", "3", "4", " ", " x"]),
        (
            "qwen2",
            "IT'S 1234 a.b\n\n  x",
            ["IT", "'S", " ", "1", "2", "3", "4", " a", ".b", "\n\n", " ", " x"],
        ),
        ("llama-bpe", "I'll 12345 (x)\n y", ["I", "'ll", " ", "123", "45", " (", "x", ")\n", " y"]),
        ("tekken", "HelloWorld's 12/\n", ["Hello", "World", "'s", " ", "1", "2", "/\n"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", " ", "123", "4"]),
        ("deepseek-llm", "a 12 你好b!\n\n", ["a", " ", "12", " ", "你好", "b", "!", "\n", "\n"]),
        ("deepseek-coder", "a 12你好", ["a", " ", "1", "2", "你好"]),
        ("deepseek-v3", "x=1234 你a", ["x", "=", "123", "4", " ", "你", "a"]),
        ("default", "a+1234", ["a", "+", "123", "4"]),
    ],
)
def test_pre_tokenizers_cut_as_their_families_do(pre: str, text: str, cut: list[str]) -> None:
    assert pieces(pre, text) == cut


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_no_pre_tokenizer_loses_text(pre: str) -> None:
    text = "Ünïcode 你好 👩‍👩‍👧 1234567 don't \t\r\n\n  end  "
    assert "".join(pieces(pre, text)) == text


def test_whole_words_are_taken_without_merging_where_the_family_says_so() -> None:
    tokens = [*BYTE_LEVEL_ALPHABET, "xyz"]
    changes = {"tokens": tokens, "token_type": None, "merges": ["h e"], "eos_token_id": None}
    with pytest.raises(CheckpointError, match="do not fit together"):
        tokenizer_from_gguf(fields(**changes))
    changes["merges"] = []
    assert tokenizer_from_gguf(fields(**changes, pre="llama-bpe")).encode("xyz") == [256]
    assert len(tokenizer_from_gguf(fields(**changes)).encode("xyz")) == 3


def test_bos_by_family_and_by_flag() -> None:
    changes: dict[str, Any] = {"bos_token_id": 258}
    assert tokenizer_from_gguf(fields(**changes)).encode("a") == [TOKENS.index("a")]
    assert tokenizer_from_gguf(fields(**changes, pre="llama-bpe")).encode("a") == [258, TOKENS.index("a")]
    assert tokenizer_from_gguf(fields(**changes, add_bos_token=True)).encode("a")[0] == 258
    assert tokenizer_from_gguf(fields(**changes, add_eos_token=True)).encode("a")[-1] == 258


def test_no_token_is_written_as_minus_one() -> None:
    """As an unsigned number: ggml's stories260K has such a token for padding."""
    tokenizer = tokenizer_from_gguf(fields(padding_token_id=2**32 - 1))
    assert (tokenizer.pad_token, tokenizer.eos_token) == (None, "<|end|>")


def test_chat_templates() -> None:
    named = {"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "T"}
    assert tokenizer_from_gguf(fields() | named).chat_templates == {"default": "A", "tool_use": "T"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert' is not supported"),
        ({"pre": "no-such"}, "tokenizer.ggml.pre='no-such': unknown pre-tokenizer"),
        ({"merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"merges": ["he"]}, "merges has 'he'"),
        ({"tokens": [*TOKENS[:-1], "he"], "token_type": [NORMAL] * 261}, "'he' is in the vocabulary twice"),
        ({"tokens": 5}, "tokens is 5; it must be an array of str"),
        ({"token_type": [0.5]}, r"token_type is \[0.5\]; it must be an array of int"),
        ({"eos_token_id": 9999}, "eos_token_id=9999 is outside the vocabulary of 261"),
        ({"eos_token_id": [1]}, r"eos_token_id is \[1\]; it must be a token id"),
    ],
)
def test_wrong_metadata_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_gguf(fields(**changes))
