"""What one step does, as frozen plain data: the scheduler's decision and the runner's orders."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.engine.protocol import CoreRequest, TokenLogprobs

ON_DEVICE = -1  # token id of an input token that only the device knows so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A sequence takes a slot (for the first time, or again after preemption)."""

    slot: int
    request: CoreRequest
    token_ids: tuple[int, ...]  # prompt and what was generated before a preemption


@dataclass(slots=True, kw_only=True)
class PlanEntry:
    """The share of one sequence in a step.  Nobody changes one; freezing it would treble the time to make it."""

    seq_id: int
    slot: int
    start: int  # position of the first input token
    token_ids: tuple[int, ...]  # input tokens; ON_DEVICE for one sampled by a step still in flight
    samples: bool  # whether the last input token yields a new token
    num_generated: int  # tokens generated before this step's, for min_tokens
    page_offset: int  # where new_pages go in the sequence's page row
    new_pages: tuple[int, ...]
    tail_ids: tuple[int, ...] = ()  # last known tokens, for sequences whose mask depends on them
    # The token after each input token whose prompt log-probability is wanted.
    prompt_targets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: first the admissions, then the entries, decode entries before prefill chunks."""

    step_id: int
    admissions: tuple[Admission, ...]
    entries: tuple[PlanEntry, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)

    @property
    def scores_prompts(self) -> bool:
        """Whether prompt log-probabilities are wanted, for which hidden states of all tokens must be kept."""
        return any(entry.prompt_targets for entry in self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What came back, in the plan's order: one item per entry."""

    token_ids: list[int]  # sampled token; meaningless where the entry does not sample
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[list[TokenLogprobs]]
