"""Log-probabilities of token ids, told with the text of each token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxserve.outputs import Logprob

if TYPE_CHECKING:
    from jaxserve.engine.protocol import TokenLogprobs
    from jaxserve.text.tokenizer import Tokenizer


class LogprobsBuilder:
    """Turns the log-probabilities of consecutive positions into dicts of `Logprob`.

    As in vLLM, a token that ends within a character has the text "" and the token that completes it the whole
    character: the texts of the sampled tokens join to the answer.  Without a tokenizer there are no texts.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds the beginning of a character

    def push(self, position: TokenLogprobs) -> dict[int, Logprob]:
        """The candidates of the next position: the sampled (or prompt) token first, then the likeliest."""
        state = self._decoder.getstate()
        candidates = {position.token_id: Logprob(position.logprob, position.rank)}
        for i, token_id in enumerate(position.top_ids):
            if token_id != position.token_id:
                text = self._candidate_text(token_id, state)
                candidates[token_id] = Logprob(position.top_logprobs[i], i + 1, text)
        self._decoder.setstate(state)
        candidates[position.token_id].decoded_token = self.skip(position.token_id)
        return candidates

    def skip(self, token_id: int) -> str | None:
        """Pass over a token, such as the prompt's first, which has no log-probability; its text."""
        if self._tokenizer is None:
            return None
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def _candidate_text(self, token_id: int, state: tuple[bytes, int]) -> str | None:
        """Text of a token that was not taken: its own if that is text, else what it would complete."""
        if self._tokenizer is None:
            return None
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._decoder.setstate(state)
            return self._decoder.decode(data)


def prompt_logprobs(
    token_ids: Sequence[int], positions: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> list[dict[int, Logprob] | None]:
    """One entry per prompt token; the first is None, since nothing precedes it."""
    builder = LogprobsBuilder(tokenizer)
    builder.skip(token_ids[0])
    return [None, *(builder.push(position) for position in positions)]
