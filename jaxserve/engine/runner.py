"""Runs step plans on the device: host tables in, compiled programs, tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.batch import new_pages, pack
from jaxserve.engine.forward_programs import ASSIGN_CHUNK
from jaxserve.engine.lattice import BurstShape, ForwardShape
from jaxserve.engine.pace import MAX_BURST
from jaxserve.engine.packed_model import Weights
from jaxserve.engine.pending_step import PendingStep, read_step
from jaxserve.engine.plan import Admission, StepPlan, StepResult
from jaxserve.engine.programs import ADMIT, ASSIGN, PROMPT_LOGPROBS, ProgramBook, resize_program
from jaxserve.engine.sampler_programs import ADMIT_CHUNK, num_state_arrays
from jaxserve.engine.sampling_rows import bias_arrays, needs_state
from jaxserve.engine.settle import Settings
from jaxserve.engine.slot_rows import SamplerInputs, SlotRows
from jaxserve.engine.tower import Tower
from jaxserve.errors import ConfigError
from jaxserve.sampling_params import SamplingParams

Programs = dict[str, jax.stages.Compiled]


class Runner:
    """Owns the weights, the KV pages and the sampler state on the device.

    `dispatch` returns while the device works; dispatched steps run in order.  `fetch` waits for one.
    """

    def __init__(
        self,
        settings: Settings,
        weights: Weights,
        programs: Programs,
        book: ProgramBook,
        tower: Tower | None = None,
    ) -> None:
        """`programs` are those of `book`, compiled.  Models that see have a `tower`."""
        self._tower = tower
        self._settings = settings
        self._weights = weights
        self._programs = programs
        self._put = book.put
        self._kv_pages = tuple(_zeros(spec) for spec in book.kv_specs)
        self._page_table = _zeros(book.page_table_spec)
        self._state = tuple(_zeros(spec) for spec in book.state_specs)  # in which no slot was admitted
        slots = settings.max_num_seqs
        self._dummy_slot = slots
        self._rows = SlotRows(slots, settings.model.vocab_size, settings.lattice)
        self._step_numbers = book.put([np.int32(step) for step in range(MAX_BURST)])  # on the device already

    def warm_up(self) -> None:
        """Run every program once, on padding: the first run loads kernels and builds CUDA graphs.

        On a CPU the first run of SmolLM2's programs for 64 and 256 tokens costs 300 ms of processor time more than
        later ones, each.

        Raises ConfigError if the device has too little memory for one of them.
        """
        if self._tower is not None:
            self._tower.warm_up()
        lattice = self._settings.lattice
        empty = StepPlan(admissions=(), entries=())
        hidden: dict[int, jax.Array] = {}  # by number of rows
        name = ""
        try:
            # The largest first: what does not fit had better be known soon.
            for shape in sorted(lattice.forwards, key=lambda shape: -shape.num_tokens):
                name = shape.name
                outputs = self._call_forward(shape, pack(empty, shape, [], self._dummy_slot))
                hidden[outputs[0].shape[0]] = outputs[0]
                if shape.scores_prompts:
                    name = PROMPT_LOGPROBS
                    targets = np.zeros(lattice.prompt_chunk, np.int32)
                    self._programs[name](self._weights.head, outputs[-1], np.int32(0), targets)
                jax.block_until_ready(outputs[0])  # one at a time, as they will be later
            for given, taken in lattice.resizes():
                name = resize_program(given, taken)
                hidden[taken] = self._programs[name](hidden[given])
            for sampler in lattice.samples:
                name = sampler.name
                self._call_sampler(self._rows.padding(sampler), hidden[sampler.num_rows])
                jax.block_until_ready(self._state)
            for burst in lattice.bursts:
                name = burst.name
                vector = pack(empty, burst.forward, [], self._dummy_slot)
                numbers = self._rows.padding(burst.sample).numbers
                jax.block_until_ready(self._call_burst(burst, vector, numbers))
            name = ASSIGN
            self._assign([])
            name = ADMIT
            self._admit_chunk(self._dummy_slot, [], 0, is_first=True, bias=bias_arrays(SamplingParams()))
            jax.block_until_ready(self._state)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ConfigError(
                f"the device's memory does not suffice for program {name}: lower gpu_memory_utilization, "
                "max_num_batched_tokens or max_num_seqs"
            ) from error

    def dispatch(self, plan: StepPlan) -> PendingStep:
        """Start a step: returns once everything is queued on the device."""
        self._encode(plan)
        shape, vector = self._forward_inputs(plan)
        sampler = self._rows.inputs(plan)
        if (
            plan.num_steps == MAX_BURST
            and sampler is not None
            and (burst := self._settings.lattice.burst(shape, sampler.shape)) is not None
        ):
            ids = self._call_burst(burst, vector, sampler.numbers)
            ids.copy_to_host_async()
            return self._pending(plan, ids, None)  # nobody in it has a mask
        if plan.num_steps > 1:  # what its steps share travels once
            vector, sampler = self._put((vector, sampler))
        sampled: list[tuple[jax.Array, ...]] = []
        hidden: jax.Array | None = None
        for step in range(plan.num_steps):
            outputs = self._call_forward(shape, vector, step)
            hidden = outputs[-1]
            if sampler is not None:
                sampled.append(self._sample(sampler, outputs[0], step))
        assert hidden is not None, "a plan has a step at least"
        return self._pending(plan, sampled, hidden, () if sampler is None else sampler.stuck)

    def start(self, plan: StepPlan) -> tuple[jax.Array, ...]:
        """Queue a step's forward pass alone, for `finish` to go on with."""
        assert plan.num_steps == 1
        self._encode(plan)
        return self._call_forward(*self._forward_inputs(plan))

    def finish(
        self, plan: StepPlan, outputs: tuple[jax.Array, ...], allowed: Mapping[int, np.ndarray]
    ) -> PendingStep:
        """Queue the rest of a step that was started, its plan possibly with fewer entries that sample.

        `allowed`: further masks of entries, [words] uint32.
        """
        sampler = self._rows.inputs(plan, allowed)
        if sampler is None:
            return self._pending(plan, [], outputs[-1])
        return self._pending(plan, [self._sample(sampler, outputs[0], 0)], outputs[-1], sampler.stuck)

    def _encode(self, plan: StepPlan) -> None:
        """Queue the call of the tower that a step wants ahead of its forward pass, if it does."""
        if plan.encodes:
            assert self._tower is not None
            self._tower.encode(plan.encodes)

    def _forward_inputs(self, plan: StepPlan) -> tuple[ForwardShape, np.ndarray | jax.Array]:
        """The forward pass for a plan, and what it is told."""
        shape = self._forward_shape(plan)
        pages = new_pages(plan)
        if len(pages) > shape.num_new_pages:
            self._assign(pages)
            pages = []
        return shape, pack(plan, shape, pages, self._dummy_slot)

    def _pending(
        self,
        plan: StepPlan,
        sampled: list[tuple[jax.Array, ...]] | jax.Array,
        hidden: jax.Array | None,
        stuck: tuple[int, ...] = (),
    ) -> PendingStep:
        # Read now: a later step may give a slot to another sequence.
        num_logprobs, num_prompt_logprobs = self._rows.num_logprobs(plan)
        return PendingStep(
            plan=plan,
            sampled=sampled,
            num_logprobs=num_logprobs,
            prompt_scores={} if hidden is None else self._score_prompts(plan, hidden),
            num_prompt_logprobs=num_prompt_logprobs,
            stuck=stuck,
        )

    def fetch(self, pending: PendingStep) -> StepResult:
        """Wait for a step and read its tokens."""
        return read_step(pending)

    def admit(self, admission: Admission) -> None:
        """Fill a slot's host rows, and its row of the device state if its parameters look there.

        To be called for each admission of a plan before the plan is dispatched.
        """
        slot, request = admission.slot, admission.request
        self._rows.admit(slot, request)
        if not needs_state(request.params):
            return
        bias = bias_arrays(request.params)
        num_prompt = len(request.prompt_token_ids)
        for start in range(0, len(admission.token_ids), ADMIT_CHUNK):
            chunk = admission.token_ids[start : start + ADMIT_CHUNK]
            num_prompt_here = min(max(num_prompt - start, 0), len(chunk))
            self._admit_chunk(slot, chunk, num_prompt_here, is_first=start == 0, bias=bias)

    def _admit_chunk(
        self,
        slot: int,
        chunk: Sequence[int],
        num_prompt: int,
        *,
        is_first: bool,
        bias: tuple[np.ndarray, np.ndarray],
    ) -> None:
        token_ids = np.zeros(ADMIT_CHUNK, np.int32)
        token_ids[: len(chunk)] = chunk
        counts = np.int32(num_prompt), np.int32(len(chunk))
        self._state = self._programs[ADMIT](
            self._state, np.int32(slot), token_ids, *counts, np.bool_(is_first), *bias
        )

    def _call_forward(
        self, shape: ForwardShape, vector: np.ndarray | jax.Array, step: int = 0
    ) -> tuple[jax.Array, ...]:
        """Hidden rows that may sample, and of a scoring step those of all tokens."""
        *outputs, self._kv_pages, self._page_table = self._programs[shape.name](
            self._weights.model,
            self._kv_pages,
            self._page_table,
            self._state[0],
            vector,
            self._step_numbers[step],
            *self._image_cache(),
        )
        return tuple(outputs)

    def _image_cache(self) -> tuple[jax.Array, ...]:
        """What forward passes of models that see take beside the rest."""
        return () if self._tower is None else (self._tower.cache,)

    def _call_burst(
        self, shape: BurstShape, vector: np.ndarray | jax.Array, numbers: np.ndarray | jax.Array
    ) -> jax.Array:
        """The ids that MAX_BURST steps sample, [MAX_BURST, rows of the sampler]."""
        num_arrays = num_state_arrays(shape.sample)
        ids, self._kv_pages, self._page_table, state = self._programs[shape.name](
            self._weights.model,
            self._weights.head,
            self._kv_pages,
            self._page_table,
            self._state[:num_arrays],
            vector,
            numbers,
            *self._image_cache(),
        )
        self._state = (*state, *self._state[num_arrays:])
        return ids

    def _assign(self, pages: Sequence[tuple[int, int, int]]) -> None:
        """Write new pages into the page table ahead of a step, whose vector has no room for so many."""
        for first in range(0, max(1, len(pages)), ASSIGN_CHUNK):
            chunk = np.zeros((3, ASSIGN_CHUNK), np.int32)
            chunk[0] = self._dummy_slot
            some = pages[first : first + ASSIGN_CHUNK]
            if some:
                chunk[:, : len(some)] = np.array(some, np.int32).T
            self._page_table = self._programs[ASSIGN](self._page_table, *chunk)

    def _call_sampler(self, inputs: SamplerInputs, hidden: jax.Array, step: int = 0) -> tuple[jax.Array, ...]:
        num_arrays = num_state_arrays(inputs.shape)
        sampled, state = self._programs[inputs.shape.name](
            self._weights.head,
            self._state[:num_arrays],
            hidden,
            inputs.numbers,
            self._step_numbers[step],
            *inputs.mask,
        )
        self._state = (*state, *self._state[num_arrays:])
        return sampled

    def _forward_shape(self, plan: StepPlan) -> ForwardShape:
        lattice = self._settings.lattice
        if plan.scores_prompts:
            assert plan.num_tokens <= lattice.scoring.num_tokens, "the scheduler keeps to the scoring budget"
            return lattice.scoring
        return lattice.step(plan.num_tokens, len(plan.entries), plan.num_steps)

    def _sample(self, inputs: SamplerInputs, hidden: jax.Array, step: int) -> tuple[jax.Array, ...]:
        """Queue the sampler, and the way of its results to the host."""
        num_rows = inputs.shape.num_rows
        if hidden.shape[0] != num_rows:
            hidden = self._programs[resize_program(hidden.shape[0], num_rows)](hidden)
        sampled = self._call_sampler(inputs, hidden, step)
        for array in sampled:
            array.copy_to_host_async()
        return sampled

    def _score_prompts(self, plan: StepPlan, hidden: jax.Array) -> dict[int, list[tuple[jax.Array, ...]]]:
        """Queue prompt log-probabilities for the entries that want them."""
        scores: dict[int, list[tuple[jax.Array, ...]]] = {}
        chunk = self._settings.lattice.prompt_chunk
        token = 0
        for row, entry in enumerate(plan.entries):
            for start in range(0, len(entry.prompt_targets), chunk):
                targets = np.zeros(chunk, np.int32)
                part = entry.prompt_targets[start : start + chunk]
                targets[: len(part)] = part
                scores.setdefault(row, []).append(
                    self._programs[PROMPT_LOGPROBS](
                        self._weights.head, hidden, np.int32(token + start), targets
                    )
                )
            token += len(entry.token_ids)
        return scores


def _zeros(spec: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(spec.shape, spec.dtype, device=spec.sharding)
