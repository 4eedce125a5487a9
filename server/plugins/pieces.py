"""An answer's text cut at its tokens, since vLLM's parsers are written for one token a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer


class TokenPieces:
    """Which part of the text came with which token.

    Text may lag behind its tokens, where half a character or the beginning of a stop string was held back: it
    then comes with a later token, as in vLLM.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._num_expected = 0  # characters that the tokens stand for
        self._num_given = 0

    def push(self, text: str, token_ids: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
        """Pieces of `text`, with one token each; together they are all of it.  Text without tokens is one piece."""
        if not token_ids and text:
            self._num_given += len(text)
            yield text, []
        for i, token_id in enumerate(token_ids):
            self._num_expected += len(self._detokenizer.push([token_id]))
            is_last = i == len(token_ids) - 1
            length = len(text) if is_last else min(max(self._num_expected - self._num_given, 0), len(text))
            piece, text = text[:length], text[length:]
            self._num_given += length
            yield piece, [token_id]
