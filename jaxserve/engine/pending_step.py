"""A step that the device works on, and what is read of it when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxserve.engine.plan import PlanEntry, StepPlan, StepResult
from jaxserve.engine.protocol import TokenLogprobs


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A dispatched step: arrays that the device is still computing."""

    plan: StepPlan
    # Of each step of the plan: ids, or ids and four arrays of log-probabilities; nothing where no entry samples.  Of a
    # burst that ran as one program: the ids of all its steps.
    sampled: list[tuple[jax.Array, ...]] | jax.Array
    num_logprobs: list[int]  # per entry, -1 for none
    prompt_scores: dict[int, list[tuple[jax.Array, ...]]]  # entry index -> chunks
    num_prompt_logprobs: list[int]  # per entry
    stuck: tuple[int, ...] = ()  # entries whose masks leave no token


def read_step(pending: PendingStep) -> StepResult:
    """Wait for a step and read its tokens."""
    entries = pending.plan.entries
    ids: list[list[int]] = [[] for _ in entries]
    logprobs: list[list[TokenLogprobs] | None] = [None] * len(entries)
    steps = pending.sampled
    if not isinstance(steps, list):
        steps = [(step_ids,) for step_ids in np.asarray(steps)]
    for step, (sampled, *scores) in enumerate(steps):
        for row, (entry, token_id) in enumerate(zip(entries, np.asarray(sampled).tolist(), strict=False)):
            if step < entry.num_steps:
                ids[row].append(token_id)
        if scores:
            _read_logprobs(logprobs, entries, pending.num_logprobs, ids, step, scores)
    prompt: list[list[TokenLogprobs]] = [[] for _ in entries]
    for row, chunks in pending.prompt_scores.items():
        prompt[row] = _read_scores(entries[row], chunks, pending.num_prompt_logprobs[row])
    return StepResult(token_ids=ids, logprobs=logprobs, prompt_logprobs=prompt)


def _read_logprobs(
    logprobs: list[list[TokenLogprobs] | None],
    entries: Sequence[PlanEntry],
    num_wanted: Sequence[int],
    ids: Sequence[Sequence[int]],
    step: int,
    scores: Sequence[jax.Array],
) -> None:
    """Add one step's log-probabilities to those of the entries that want them."""
    values, ranks, top_ids, top_values = (np.asarray(array) for array in scores)
    for row, (entry, wanted) in enumerate(zip(entries, num_wanted, strict=True)):
        if not entry.samples or wanted < 0 or step >= entry.num_steps:
            continue
        found = logprobs[row] = logprobs[row] or []
        found.append(
            TokenLogprobs(
                token_id=ids[row][step],
                logprob=float(values[row]),
                rank=int(ranks[row]),
                top_ids=top_ids[row, :wanted].tolist(),
                top_logprobs=top_values[row, :wanted].tolist(),
            )
        )


def _read_scores(entry: PlanEntry, chunks: list[tuple[jax.Array, ...]], wanted: int) -> list[TokenLogprobs]:
    values, ranks, top_ids, top_values = (
        np.concatenate([np.asarray(chunk[part]) for chunk in chunks]) for part in range(4)
    )
    return [
        TokenLogprobs(
            token_id=token_id,
            logprob=float(values[index]),
            rank=int(ranks[index]),
            top_ids=top_ids[index, :wanted].tolist(),
            top_logprobs=top_values[index, :wanted].tolist(),
        )
        for index, token_id in enumerate(entry.prompt_targets)
    ]
