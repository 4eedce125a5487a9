"""What one step does, as frozen plain data: the scheduler's decision and the runner's orders."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.engine.protocol import CoreRequest, ImageInput, TokenLogprobs

ON_DEVICE = -1  # token id of an input token that only the device knows so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A sequence takes a slot (for the first time, or again after preemption)."""

    slot: int
    request: CoreRequest
    token_ids: tuple[int, ...]  # prompt and what was generated before a preemption


@dataclass(frozen=True, slots=True, kw_only=True)
class Encode:
    """An image for the tower, and the pages of the encoder's cache that its tokens go to."""

    image: ImageInput
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpan:
    """An image some of whose tokens are among an entry's."""

    start: int  # position of its first token in the sequence
    num_rows: int  # tokens down
    num_columns: int  # tokens across
    rope_start: int  # rotary position of its first token
    pages: tuple[int, ...]  # of the encoder's cache

    @property
    def end(self) -> int:
        """Position of the token behind it."""
        return self.start + self.num_rows * self.num_columns

    @property
    def rope_delta(self) -> int:
        """What the rotary positions of the text behind it are ahead of its positions: an image is as long as wide."""
        return self.rope_start + max(self.num_rows, self.num_columns) - self.end


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
    num_steps: int = 1  # tokens sampled one after the other, each being the next one's input; see StepPlan
    tail_ids: tuple[int, ...] = ()  # last known tokens, for sequences whose mask depends on them
    # The token after each input token whose prompt log-probability is wanted.
    prompt_targets: tuple[int, ...] = ()
    # Of models that see: images with tokens among the input, in order, and rotary minus plain position of the text
    # before the first of them.
    images: tuple[ImageSpan, ...] = ()
    rope_delta: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: first the admissions, then the entries, decode entries before prefill chunks.

    A burst is several decode steps under one plan, for a device that is faster than the host plans: `num_steps` of
    them, in each of which an entry takes part that has not sampled its own number of tokens yet.
    """

    admissions: tuple[Admission, ...]
    entries: tuple[PlanEntry, ...]
    num_steps: int = 1
    encodes: tuple[Encode, ...] = ()  # images for one call of the tower, ahead of the forward pass

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)

    @property
    def is_single(self) -> bool:
        """Whether this is one decode step."""
        return self.num_steps == 1 and len(self.entries[-1].token_ids) == 1

    @property
    def scores_prompts(self) -> bool:
        """Whether prompt log-probabilities are wanted, for which hidden states of all tokens must be kept."""
        return any(entry.prompt_targets for entry in self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What came back, in the plan's order: one item per entry."""

    token_ids: list[
        list[int]
    ]  # sampled tokens, one a step of the entry; meaningless where it does not sample
    logprobs: list[list[TokenLogprobs] | None]  # likewise; None where nobody asked
    prompt_logprobs: list[list[TokenLogprobs]]
