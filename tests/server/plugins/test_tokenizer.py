"""The tokenizer that plug-ins get behaves like a Hugging Face one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jaxserve.server.plugins.tokenizer import PluginTokenizer
from tests.tiny import BOS, EOS, IM_START, TOOL_CALL, byte_tokenizer

OURS = PluginTokenizer(byte_tokenizer(add_bos=True))
THEIRS = PreTrainedTokenizerFast(
    tokenizer_object=byte_tokenizer(add_bos=True).backend, bos_token="<|bos|>", eos_token="<|eos|>"
)
TEXTS = st.lists(
    st.text(max_size=6) | st.sampled_from(["<tool_call>", "<|im_start|>", "é", "\U0001f600"]), max_size=4
).map("".join)


@given(TEXTS, st.booleans())
def test_encode_and_decode(text: str, special: bool) -> None:
    """Ids, tokens and texts are the library's."""
    ids = OURS.encode(text, add_special_tokens=special)
    assert (
        ids
        == THEIRS.encode(text, add_special_tokens=special)
        == OURS(text, add_special_tokens=special)["input_ids"]
    )
    assert OURS.tokenize(text) == THEIRS.tokenize(text)
    for skip in (False, True):
        assert OURS.decode(ids, skip_special_tokens=skip) == THEIRS.decode(ids, skip_special_tokens=skip)
    assert OURS.convert_ids_to_tokens(ids) == THEIRS.convert_ids_to_tokens(ids)
    assert OURS.convert_tokens_to_ids(OURS.tokenize(text)) == THEIRS.convert_tokens_to_ids(
        OURS.tokenize(text)
    )
    assert OURS.convert_tokens_to_string(OURS.tokenize(text)) == text


@pytest.mark.parametrize(
    "name",
    [
        "bos_token",
        "bos_token_id",
        "eos_token",
        "eos_token_id",
        "pad_token",
        "pad_token_id",
        "vocab",
        "vocab_size",
        "is_fast",
    ],
)
def test_attributes(name: str) -> None:
    """Attributes are the library's."""
    assert getattr(OURS, name) == getattr(THEIRS, name)


def test_vocabulary() -> None:
    """Added and special tokens; the vocabulary is listed once."""
    assert OURS.get_vocab() is OURS.get_vocab()
    assert OURS.get_vocab() == THEIRS.get_vocab()
    assert OURS.get_added_vocab() == THEIRS.get_added_vocab()
    assert len(OURS) == len(THEIRS)
    assert OURS.max_token_id == len(THEIRS) - 1
    assert OURS.all_special_ids[:3] == [BOS, EOS, IM_START]
    assert "<|im_start|>" in OURS.all_special_tokens
    assert "<tool_call>" not in OURS.all_special_tokens
    assert OURS.special_tokens_map["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert OURS.convert_ids_to_tokens(TOOL_CALL) == "<tool_call>"
    assert OURS.convert_tokens_to_ids("<tool_call>") == TOOL_CALL
    assert OURS.convert_tokens_to_ids("no such token") is None
    assert OURS.batch_decode([[104, 105], [BOS]], skip_special_tokens=True) == ["hi", ""]
    assert OURS(["a", "bc"], add_special_tokens=False)["attention_mask"] == [[1], [1, 1]]
    assert str(OURS.added_tokens_decoder[BOS]) == "<|bos|>"
