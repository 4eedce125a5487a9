"""Token ids become text as they come, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from jaxserve.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes in UTF-8


class Detokenizer:
    """Decodes one answer incrementally.

    What `push` and `flush` return joins to what `Tokenizer.decode` says about the answer, read on from its
    prompt: a character that the prompt's last tokens begin is completed, and the space that SentencePiece
    puts before a text is dropped only if nothing of the prompt is seen.

    Text is bytes here, so a token costs what its bytes cost, and U+FFFD comes out only for bytes that no
    continuation could make valid.  (The library's own DecodeStream decodes windows of tokens instead: it
    holds text back for as long as invalid bytes come, and fails when SentencePiece byte tokens turn out
    invalid.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        kept_special_tokens: Collection[int] = (),
    ) -> None:
        """`kept_special_tokens` become text even if special tokens are skipped."""
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._skipped_ids = self._skipped_ids.difference(kept_special_tokens)
        # vLLM's meaning: False takes the spaces off an added token that follows another one.
        self._close_up = not (skip_special_tokens or spaces_between_special_tokens)
        self._was_added = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_text_start = True
        self._begin_in_character(prompt_token_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now; empty while a character is incomplete.

        One that is incomplete when the answer ends is nobody's, since the answer was cut in its middle.
        """
        return self._utf8.decode(
            b"".join([self._bytes_of(i) for i in token_ids if i not in self._skipped_ids])
        )

    def _bytes_of(self, token_id: int) -> bytes:
        data = self._tokenizer.token_bytes(token_id)
        if self._close_up:
            is_added = token_id in self._tokenizer.added_ids
            if is_added and self._was_added:
                data = data.lstrip(b" ")
            self._was_added = is_added
        if self._is_text_start and data:
            self._is_text_start = False
            data = data[self._tokenizer.num_leading_spaces(data) :]
        return data

    def _begin_in_character(self, prompt_token_ids: Sequence[int]) -> None:
        """Take up the bytes of a character that the prompt began; its complete text is not ours to give."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if token_id not in self._skipped_ids:
                tail = self._tokenizer.token_bytes(token_id) + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        self._is_text_start = not tail
        self._utf8.decode(tail[-_LONGEST_CHARACTER:])
