"""A model's vocabulary as llguidance sees it: the bytes of each token, which are marks, which end an answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from jaxserve.structured.lark import control_ids

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from jaxserve.text.tokenizer import Tokenizer

# Characters of a text beyond which its beginning is all that is tokenized: more is not taken at once, and the step loop
# waits for it.  The tokens of such texts are remembered, since the answers to one request force the same.
_LONG_TEXT = 2048
_CUT_OFF = 64  # characters before the cut whose tokens may be others than in the whole text
_MARK = "\x02"  # stands before a text to keep a tokenizer from putting a space there


def build_vocabulary(tokenizer: Tokenizer, vocab_size: int, end_token_ids: Sequence[int]) -> LLTokenizer:
    """The `vocab_size` ids that a model can write; those without a token are never allowed.

    Holds the interpreter's lock for about 0.15 s per 50,000 tokens.  `end_token_ids` must not be empty.
    """
    from llguidance import LLTokenizer

    wrapper = _Wrapper(tokenizer, vocab_size, end_token_ids)
    vocabulary = LLTokenizer(wrapper, eos_token=list(end_token_ids))  # type: ignore[arg-type]  # by shape
    wrapper.vocabulary = vocabulary
    return vocabulary


class _Wrapper:
    """The shape that llguidance asks for: attributes that it reads once, and a call that tokenizes a text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        marks = {i for i in control_ids(tokenizer) if i < vocab_size}
        self.vocabulary: LLTokenizer | None = None
        self.eos_token_id = end_token_ids[0]
        self.special_token_ids = sorted(marks)
        # A mark is written as its name, and llguidance sees to it that it never passes for text.
        self.tokens = [
            (tokenizer.id_to_token(i) or "").encode() if i in marks else tokenizer.token_bytes(i)
            for i in range(vocab_size)
        ]
        self._tokenizer = tokenizer
        self._marks = marks
        self._tokens_of_long = lru_cache(maxsize=8)(self._tokens_of_beginning)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text as the model would write it, marks in it taken for text.  Must not raise."""
        return self._tokens_of(text) if len(text) <= _LONG_TEXT else self._tokens_of_long(text[:_LONG_TEXT])

    def _tokens_of_beginning(self, text: str) -> list[int]:
        """The tokens of a text that goes on, without the last ones."""
        ids = self._tokens_of(text)
        num_bytes = len(text[:-_CUT_OFF].encode())
        ends = itertools.accumulate(len(self.tokens[i]) for i in ids)
        return [i for i, end in zip(ids, ends, strict=True) if end <= num_bytes]

    def _tokens_of(self, text: str) -> list[int]:
        wanted = text.encode()
        for prefix in ("", _MARK):
            ids = self._without(prefix, self._tokenizer.encode(prefix + text, add_special_tokens=False))
            if self._spells(ids, wanted):
                return ids
        assert self.vocabulary is not None
        return self.vocabulary.greedy_tokenize(text)

    def _without(self, prefix: str, ids: list[int]) -> list[int]:
        """The ids behind the prefix; none if it is not tokenized apart."""
        if not prefix:
            return ids
        written = b""
        for index, token_id in enumerate(ids):
            written += self.tokens[token_id] if token_id < len(self.tokens) else b""
            if written.lstrip(b" ") == prefix.encode():
                return ids[index + 1 :]
        return []

    def _spells(self, ids: list[int], text: bytes) -> bool:
        known = all(i < len(self.tokens) and i not in self._marks for i in ids)
        return known and b"".join([self.tokens[i] for i in ids]) == text
