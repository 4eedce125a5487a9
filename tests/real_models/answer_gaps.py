"""How far an engine's log-probabilities are from the recorded ones, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve import LLM, SamplingParams
from tests.real_models.test_goldens import Golden


def answer_gaps(llm: LLM, goldens: Sequence[Golden]) -> list[np.ndarray]:
    """Of each recorded answer, read after its prompt, the distance of every token's log-probability, [G]."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    texts = [golden.prompt_ids + golden.token_ids for golden in goldens]
    gaps = []
    for golden, text, output in zip(goldens, texts, llm.generate(texts, params, use_tqdm=False), strict=True):
        assert output.prompt_logprobs is not None
        own = [
            positions[token_id].logprob
            for positions, token_id in zip(output.prompt_logprobs, text, strict=True)
            if positions is not None
        ][len(golden.prompt_ids) - 1 :]
        gaps.append(np.abs(np.asarray(own) - golden.logprobs[: len(own)]))
    return gaps


def describe(gaps: Sequence[np.ndarray]) -> str:
    """In one line."""
    every = np.concatenate(gaps)
    worst_mean = max(gap.mean() for gap in gaps)
    return (
        f"{len(gaps)} answers, {every.size} tokens: mean {every.mean():.4f}, "
        f"99 % within {np.quantile(every, 0.99):.4f}, largest {every.max():.4f}; worst answer {worst_mean:.4f}"
    )
