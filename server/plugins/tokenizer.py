"""The tokenizer as plug-ins know tokenizers: with the methods of Hugging Face's fast ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import overload

from tokenizers import Tokenizer as Backend

from jaxserve.text.tokenizer import Tokenizer


class PluginTokenizer:
    """One for all plug-ins of a server: what is costly to list is listed once.  Nobody may change what it gives."""

    is_fast = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.jaxserve_tokenizer = tokenizer
        self.bos_token, self.bos_token_id = tokenizer.bos_token, tokenizer.bos_token_id
        self.eos_token, self.eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id
        self.pad_token, self.pad_token_id = tokenizer.pad_token, tokenizer.pad_token_id
        self.unk_token, self.unk_token_id = tokenizer.unk_token, tokenizer.unk_token_id
        self.chat_template = tokenizer.chat_template

    def __len__(self) -> int:
        return len(self.vocab)

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True, **_: object
    ) -> dict[str, list]:
        """{"input_ids": …, "attention_mask": …} of a text, or lists of them for several texts."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        batch = [self.encode(each, add_special_tokens) for each in text]
        return {"input_ids": batch, "attention_mask": [[1] * len(ids) for ids in batch]}

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        return self.jaxserve_tokenizer.get_vocab()

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included; the same dict each time."""
        return self.vocab

    @cached_property
    def vocab_size(self) -> int:
        """Tokens without the added ones."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    @cached_property
    def max_token_id(self) -> int:
        """The highest id."""
        return self.jaxserve_tokenizer.vocab_size - 1

    @cached_property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens, lowest first."""
        return sorted(self.jaxserve_tokenizer.special_ids)

    @cached_property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, in the order of their ids."""
        return self.convert_ids_to_tokens(self.all_special_ids)

    @cached_property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that have no name of their own."""
        named = self.jaxserve_tokenizer.special_tokens.values()
        return [token for token in self.all_special_tokens if token not in named]

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """The special tokens by name: bos_token, eos_token, …, and additional_special_tokens."""
        named: dict[str, str | list[str]] = dict(self.jaxserve_tokenizer.special_tokens)
        return {**named, "additional_special_tokens": self.additional_special_tokens}

    @cached_property
    def added_tokens_decoder(self) -> dict[int, object]:
        """Id to added token, as the `tokenizers` library has them (`content`, `special`, …)."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    @cached_property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Added token to id."""
        return {self.convert_ids_to_tokens(i): i for i in sorted(self.jaxserve_tokenizer.added_ids)}

    def get_added_vocab(self) -> dict[str, int]:
        """Added token to id."""
        return self.added_tokens_encoder

    @property
    def backend_tokenizer(self) -> Backend:
        """The tokenizer of the `tokenizers` library."""
        return self.jaxserve_tokenizer.backend

    def encode(self, text: str, add_special_tokens: bool = True, **_: object) -> list[int]:
        """Token ids of a text.  Special tokens written in it are recognised."""
        return self.jaxserve_tokenizer.encode(text, add_special_tokens)

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False, **_: object) -> str:
        """The text of tokens, or of one."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.jaxserve_tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False, **_: object
    ) -> list[str]:
        """The texts of several lists of tokens."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def tokenize(self, text: str, add_special_tokens: bool = False, **_: object) -> list[str]:
        """The tokens of a text, as the vocabulary writes them."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens))

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int | None] | None:
        """The id of a token, or of each; the unknown token's id, if there is one, for what is not in the vocabulary."""
        if isinstance(tokens, str):
            return self.vocab.get(tokens, self.unk_token_id)
        return [self.vocab.get(token, self.unk_token_id) for token in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str]: ...
    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> str | list[str]:
        """The token of an id, or of each, as the vocabulary writes it."""
        if isinstance(ids, int):
            return self.jaxserve_tokenizer.id_to_token(ids) or ""
        return self.jaxserve_tokenizer.convert_ids_to_tokens(ids, skip_special_tokens)

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens that are written as in the vocabulary."""
        return self.decode([self.vocab[token] for token in tokens if token in self.vocab])
