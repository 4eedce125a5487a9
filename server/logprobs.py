"""Log-probabilities in the three shapes of the API: chat, plain completion, prompt.

Each position is JSON already: all of a long text written in one call would let no other thread run meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw

from jaxserve.outputs import Logprob
from jaxserve.server.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from jaxserve.text.tokenizer import Tokenizer

FLOOR = -9999.0  # stands for minus infinity, which JSON cannot say

_encoder = msgspec.json.Encoder()

Positions = Sequence[dict[int, Logprob] | None]


def chat_logprobs(
    token_ids: Sequence[int], positions: Positions, num_top: int, tokenizer: Tokenizer, *, as_ids: bool
) -> ChatLogprobs:
    """Per sampled token: itself and the `num_top` most likely ones.

    `bytes` are each token's own, so that they join to the answer even where a character takes several tokens.
    """
    content = []
    for token_id, candidates in zip(token_ids, positions, strict=True):
        assert candidates is not None
        sampled = candidates[token_id]
        told = TokenLogprob(
            _text(token_id, sampled, as_ids),
            _finite(sampled.logprob),
            list(tokenizer.token_bytes(token_id)),
            [
                TopLogprob(_text(i, top, as_ids), _finite(top.logprob), list(tokenizer.token_bytes(i)))
                for i, top in _most_likely(candidates, num_top)
            ],
        )
        content.append(_written(told))
    return ChatLogprobs(content)


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Positions,
    num_top: int,
    tokenizer: Tokenizer,
    *,
    as_ids: bool,
    text_offset: int = 0,
) -> tuple[CompletionLogprobs, int]:
    """Parallel lists over the tokens, and the offset after them; `text_offset` is where the first begins.

    A position without candidates is the first of an echoed prompt: nothing precedes it, so it has no
    probability.
    """
    result = CompletionLogprobs([], [], [], [])
    for token_id, candidates in zip(token_ids, positions, strict=True):
        result.text_offset.append(text_offset)
        if candidates is None:
            sampled = Logprob(0.0, decoded_token=tokenizer.decode([token_id], skip_special_tokens=False))
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
        else:
            sampled = candidates[token_id]
            shown = {token_id: sampled, **dict(_most_likely(candidates, num_top))}
            result.token_logprobs.append(_finite(sampled.logprob))
            result.top_logprobs.append(
                _written({_text(i, top, as_ids): _finite(top.logprob) for i, top in shown.items()})
            )
        result.tokens.append(_text(token_id, sampled, as_ids))
        text_offset += len(sampled.decoded_token or "")
    return result, text_offset


def prompt_logprobs(positions: Positions, num_top: int) -> PromptLogprobs:
    """vLLM's shape: per prompt token None or {token id: …}, itself first, then the `num_top` most likely."""
    answer: PromptLogprobs = []
    for candidates in positions:
        if candidates is None:
            answer.append(None)
            continue
        own = next(iter(candidates))
        shown = {own: candidates[own], **dict(_most_likely(candidates, num_top))}
        told = {
            str(i): PromptLogprob(_finite(top.logprob), top.rank, top.decoded_token)
            for i, top in shown.items()
        }
        answer.append(_written(told))
    return answer


def _written(position: Any) -> Raw:
    return Raw(_encoder.encode(position))


def _most_likely(candidates: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    if count == 0:
        return []
    return sorted(candidates.items(), key=lambda item: -item[1].logprob)[:count]


def _text(token_id: int, token: Logprob, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else token.decoded_token or ""


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)
