"""A row on the host for every slot, and from these what a step's sampler is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from jaxserve.engine.lattice import Lattice, SampleShape
from jaxserve.engine.masks import MaskBook, intersect
from jaxserve.engine.plan import StepPlan
from jaxserve.engine.protocol import CoreRequest
from jaxserve.engine.sampling_rows import (
    FLAG_ACTIVE,
    FLAG_LOGPROBS,
    FLAGS,
    NEEDS_PROCESSORS,
    NUM_FLOATS,
    NUM_INTS,
    NUM_STEPS,
    POSITION,
    SLOT,
    fill_padding,
    fill_row,
    has_processors,
    needs_of,
    needs_state,
    variant_for,
)


@partial(jax.tree_util.register_dataclass, data_fields=["numbers", "mask"], meta_fields=["shape", "stuck"])
@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """What a step's sampler is told beside the hidden states."""

    numbers: np.ndarray | jax.Array  # [B, NUM_INTS + NUM_FLOATS] int32
    mask: tuple[np.ndarray | jax.Array, ...]  # [B, mask_words(V)] uint32, if the sampler takes one
    shape: SampleShape
    stuck: tuple[int, ...] = ()  # rows to which the masks leave no token; what they take is nobody's


class SlotRows:
    """What the sequence in each slot asks of the sampler."""

    def __init__(self, num_slots: int, vocab_size: int, lattice: Lattice) -> None:
        self._lattice = lattice
        self._dummy_slot = num_slots
        self._ints = np.zeros((num_slots + 1, NUM_INTS), np.int32)
        self._floats = np.zeros((num_slots + 1, NUM_FLOATS), np.float32)
        fill_padding(self._ints, self._floats, num_slots)
        self._needs = np.zeros(num_slots, np.int32)  # NEEDS_ bits
        self._num_logprobs = np.full(num_slots, -1, np.int32)  # -1: not asked for
        self._num_prompt_logprobs = np.zeros(num_slots, np.int32)
        self._masks = MaskBook(num_slots, vocab_size)

    def admit(self, slot: int, request: CoreRequest) -> None:
        """The slot belongs to `request` from now on."""
        params = request.params
        fill_row(
            self._ints,
            self._floats,
            slot,
            params,
            slot=slot,
            position=0,
            is_active=True,
            uses_state=needs_state(params),
        )
        if params.logprobs is not None:
            self._ints[slot, FLAGS] |= FLAG_LOGPROBS
        self._needs[slot] = needs_of(params)
        self._num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._num_prompt_logprobs[slot] = params.prompt_logprobs or 0
        self._masks.admit(slot, request)

    def num_logprobs(self, plan: StepPlan) -> tuple[list[int], list[int]]:
        """Alternatives that each entry wants: beside its sampled token, -1 for none and no log-probability of that,
        and beside its prompt's tokens.
        """
        slots = [entry.slot for entry in plan.entries]
        return self._num_logprobs[slots].tolist(), self._num_prompt_logprobs[slots].tolist()

    def inputs(self, plan: StepPlan, allowed: Mapping[int, np.ndarray] | None = None) -> SamplerInputs | None:
        """What the sampler is told of the entries, row i being entry i; None if none of them samples.

        `allowed`: further masks of entries, [words] uint32.
        """
        entries = plan.entries
        idle = [row for row, entry in enumerate(entries) if not entry.samples]
        if len(idle) == len(entries):
            return None
        masked, stuck = self._masks.rows(entries)
        if allowed:
            masked, others = intersect(masked, allowed)
            stuck = tuple({*stuck, *others})
        slots = np.array([entry.slot for entry in entries])
        needs, num_logprobs = self._needs[slots], self._num_logprobs[slots]
        needs[idle], num_logprobs[idle] = 0, -1
        variant = variant_for(int(np.bitwise_or.reduce(needs)) | (NEEDS_PROCESSORS if masked else 0))
        shape = self._lattice.sample(len(entries), variant, bool(num_logprobs.max() >= 0))
        slots = np.pad(slots, (0, shape.num_rows - len(entries)), constant_values=self._dummy_slot)
        ints, floats = self._ints[slots], self._floats[slots]
        ints[: len(entries), POSITION] = [entry.start + len(entry.token_ids) for entry in entries]
        ints[: len(entries), NUM_STEPS] = [entry.num_steps for entry in entries]
        ints[idle, FLAGS] &= ~FLAG_ACTIVE
        ints[idle, SLOT] = self._dummy_slot
        return SamplerInputs(_packed(ints, floats), self._mask_of(shape, masked), shape, stuck)

    def padding(self, shape: SampleShape) -> SamplerInputs:
        """Inputs of a sampler for nobody."""
        slots = np.full(shape.num_rows, self._dummy_slot)
        return SamplerInputs(_packed(self._ints[slots], self._floats[slots]), self._mask_of(shape, {}), shape)

    def _mask_of(self, shape: SampleShape, masked: dict[int, np.ndarray]) -> tuple[np.ndarray, ...]:
        """The sampler's mask, if it takes one."""
        return (self._masks.stack(masked, shape.num_rows),) if has_processors(shape.variant) else ()


def _packed(ints: np.ndarray, floats: np.ndarray) -> np.ndarray:
    """A sampler's rows as one array, for one transfer: [B, NUM_INTS + NUM_FLOATS] int32."""
    return np.concatenate([ints, floats.view(np.int32)], axis=1)
