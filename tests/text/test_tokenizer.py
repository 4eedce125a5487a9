"""The tokenizer's face: special tokens, unusual ids, text that is no text."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jaxserve.errors import CheckpointError, RequestError
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.tokenizer_parts import TokenizerParts
from tests.tiny import BOS, EOS, IM_END, TOOL_CALL, VOCAB_SIZE, byte_tokenizer


def test_bytes_are_ids_and_specials_in_text_are_found() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("hé<|im_end|><tool_call>")
    assert ids == [*"hé".encode(), IM_END, TOOL_CALL]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hé<tool_call>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hé<|im_end|><tool_call>"
    assert tokenizer.convert_ids_to_tokens(ids) == ["h", "Ã", "©", "<|im_end|>", "<tool_call>"]
    assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) == ["h", "Ã", "©", "<tool_call>"]


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "ids"),
    [
        (False, False, [97]),
        (True, False, [BOS, 97]),
        (False, True, [97, EOS]),
        (True, True, [BOS, 97, EOS]),
    ],
)
def test_bos_and_eos_come_only_with_special_tokens(add_bos: bool, add_eos: bool, ids: list[int]) -> None:
    tokenizer = byte_tokenizer(add_bos=add_bos, add_eos=add_eos)
    assert tokenizer.encode("a", add_special_tokens=True) == ids
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_special_ids_and_names() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.special_ids == frozenset(range(256, 260))
    assert tokenizer.added_ids == frozenset(range(256, 262))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, None)
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.get_vocab()["<tool_call>"] == TOOL_CALL == tokenizer.token_to_id("<tool_call>")


def test_ids_without_a_token_give_nothing() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([97, 5000, -1, 98]) == "ab"
    assert tokenizer.id_to_token(5000) is None
    assert tokenizer.convert_ids_to_tokens([97, 5000]) == ["a", ""]


def test_invalid_bytes_become_replacement_characters() -> None:
    assert byte_tokenizer().decode([0xE4, 0xBD, 97, 0xFF]) == "\ufffda\ufffd"


def test_lone_surrogates_are_refused_naming_the_field() -> None:
    with pytest.raises(RequestError, match="lone surrogates") as caught:
        byte_tokenizer().encode("a\ud800", param="messages")
    assert caught.value.param == "messages"


def test_truncation_and_padding_of_the_file_do_not_apply() -> None:
    backend = byte_tokenizer().backend
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert Tokenizer(TokenizerParts(backend)).encode("abcd") == [*b"abcd"]


def test_special_tokens_must_exist() -> None:
    backend = byte_tokenizer().backend
    with pytest.raises(CheckpointError, match="eos_token '<nope>' is not in the vocabulary"):
        Tokenizer(TokenizerParts(backend, eos_token="<nope>"))
    with pytest.raises(CheckpointError, match="add_bos_token is set but there is no bos_token"):
        Tokenizer(TokenizerParts(backend, add_bos=True))


def test_a_decoder_that_is_not_understood_is_refused() -> None:
    backend = byte_tokenizer().backend
    backend.decoder = None  # pyright: ignore[reportAttributeAccessIssue] - the stubs forget that None is allowed
    with pytest.raises(CheckpointError, match="no decoder"):
        Tokenizer(TokenizerParts(backend))


def test_a_missing_path_is_named() -> None:
    with pytest.raises(CheckpointError, match="/no/such/place"):
        load_tokenizer("/no/such/place")


def test_long_texts_and_batches_have_the_ids_of_short_ones():
    tokenizer = byte_tokenizer(add_bos=True)
    texts = ["short", "", "<|im_start|>é" * 400, "x" * 5000]
    for add_special_tokens in (True, False):
        expected = [
            tokenizer.backend.encode(text, add_special_tokens=add_special_tokens).ids for text in texts
        ]
        assert tokenizer.encode_batch(texts, add_special_tokens) == expected
        assert [tokenizer.encode(text, add_special_tokens) for text in texts] == expected
    with pytest.raises(RequestError, match="surrogates"):
        tokenizer.encode("x" * 5000 + "\ud800")
    assert tokenizer.encode_batch([]) == []


def test_a_long_text_is_left_to_the_call_that_lets_other_threads_run():
    tokenizer = byte_tokenizer()

    class Backend:
        """The library's tokenizer, whose `encode` keeps the interpreter's lock."""

        def encode(self, text: str, **options: bool) -> Any:
            assert len(text) < 2000
            return real.encode(text, **options)

        def encode_batch_fast(self, texts: list[str], **options: bool) -> Any:
            return real.encode_batch_fast(texts, **options)

    real, tokenizer.backend = tokenizer.backend, Backend()  # pyright: ignore[reportAttributeAccessIssue]  # a stand-in
    assert len(tokenizer.encode("hello world " * 1000)) == 12_000
    assert len(tokenizer.encode("hello world")) == 11


def test_chat_templates_as_transformers_applies_them() -> None:
    ours = byte_tokenizer()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend,
        bos_token=ours.bos_token,
        eos_token=ours.eos_token,
        chat_template=ours.chat_template,
    )
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    options: list[dict[str, Any]] = [
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"chat_template": "{{ mood }}{{ tools | length }}", "mood": "good", "tools": [{"x": 1}]},
        {"padding": False, "return_tensors": None},
    ]
    for said in options:
        text = ours.apply_chat_template(conversation, tokenize=False, **said)
        assert text == theirs.apply_chat_template(conversation, tokenize=False, **said)
        assert ours.apply_chat_template(conversation, **said) == ours.encode(
            str(text), add_special_tokens=False
        )


@pytest.mark.parametrize(
    ("own", "role", "said", "param"),
    [
        ("{{ messages }}", "user", {"return_tensors": "pt"}, "return_tensors"),
        ("{{ messages }}", "user", {"chat_template": "none"}, "chat_template"),
        ("{{ messages }}", 7, {}, "messages"),
        (None, "user", {}, "chat_template"),
    ],
)
def test_chat_templates_that_cannot_be_applied(
    own: str | None, role: Any, said: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        byte_tokenizer(chat_template=own).apply_chat_template([{"role": role, "content": "Hi"}], **said)
    assert caught.value.param == param
