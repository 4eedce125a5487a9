"""Runs step plans on the device: host tables in, compiled programs, tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.batch import new_pages, pack
from jaxserve.engine.forward_programs import ASSIGN_CHUNK
from jaxserve.engine.lattice import BurstShape, ForwardShape, SampleShape
from jaxserve.engine.masks import MaskBook, intersect
from jaxserve.engine.pace import MAX_BURST
from jaxserve.engine.packed_model import Weights
from jaxserve.engine.plan import Admission, PlanEntry, StepPlan, StepResult
from jaxserve.engine.programs import ADMIT, ASSIGN, PROMPT_LOGPROBS, ProgramBook, resize_program
from jaxserve.engine.protocol import TokenLogprobs
from jaxserve.engine.sampler_programs import ADMIT_CHUNK, num_state_arrays
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
    bias_arrays,
    fill_padding,
    fill_row,
    has_processors,
    needs_of,
    needs_state,
    variant_for,
)
from jaxserve.engine.settle import Settings
from jaxserve.engine.tower import Tower
from jaxserve.errors import ConfigError
from jaxserve.sampling_params import SamplingParams

Programs = dict[str, jax.stages.Compiled]


@partial(jax.tree_util.register_dataclass, data_fields=["numbers", "mask"], meta_fields=["shape", "stuck"])
@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """What a step's sampler is told beside the hidden states."""

    numbers: np.ndarray | jax.Array  # [B, NUM_INTS + NUM_FLOATS] int32
    mask: tuple[np.ndarray | jax.Array, ...]  # [B, mask_words(V)] uint32, if the sampler takes one
    shape: SampleShape
    stuck: tuple[int, ...] = ()  # rows to which the masks leave no token; they may take any


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


class Runner:
    """Owns the weights, the KV pages and the sampler state on the device, and a host row for every slot.

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
        self._ints = np.zeros((slots + 1, NUM_INTS), np.int32)
        self._floats = np.zeros((slots + 1, NUM_FLOATS), np.float32)
        fill_padding(self._ints, self._floats, slots)
        self._needs = np.zeros(slots, np.int32)  # NEEDS_ bits
        self._num_logprobs = np.full(slots, -1, np.int32)  # -1: not asked for
        self._num_prompt_logprobs = np.zeros(slots, np.int32)
        self._masks = MaskBook(slots, settings.model.vocab_size)
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
                slots = np.full(sampler.num_rows, self._dummy_slot)
                self._call_sampler(
                    sampler,
                    hidden[sampler.num_rows],
                    _pack_rows(self._ints[slots], self._floats[slots]),
                    self._mask_of(sampler, {}),
                )
                jax.block_until_ready(self._state)
            for burst in lattice.bursts:
                name = burst.name
                slots = np.full(burst.sample.num_rows, self._dummy_slot)
                vector = pack(empty, burst.forward, [], self._dummy_slot)
                numbers = _pack_rows(self._ints[slots], self._floats[slots])
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
        sampler = self._sampler_inputs(plan)
        if (
            plan.num_steps == MAX_BURST
            and sampler is not None
            and (burst := self._settings.lattice.burst(shape, sampler.shape)) is not None
        ):
            ids = self._call_burst(burst, vector, sampler.numbers)
            ids.copy_to_host_async()
            return self._pending(plan, ids, None)
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
        return self._pending(plan, sampled, hidden)

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
        sampler = self._sampler_inputs(plan, allowed)
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
        slots = [entry.slot for entry in plan.entries]
        return PendingStep(
            plan=plan,
            sampled=sampled,
            num_logprobs=self._num_logprobs[slots].tolist(),
            prompt_scores={} if hidden is None else self._score_prompts(plan, hidden),
            num_prompt_logprobs=self._num_prompt_logprobs[slots].tolist(),
            stuck=stuck,
        )

    def fetch(self, pending: PendingStep) -> StepResult:
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

    def admit(self, admission: Admission) -> None:
        """Fill a slot's host rows, and its row of the device state if its parameters look there.

        To be called for each admission of a plan before the plan is dispatched.
        """
        slot, request = admission.slot, admission.request
        params = request.params
        uses_state = needs_state(params)
        fill_row(
            self._ints,
            self._floats,
            slot,
            params,
            slot=slot,
            position=0,
            is_active=True,
            uses_state=uses_state,
        )
        if params.logprobs is not None:
            self._ints[slot, FLAGS] |= FLAG_LOGPROBS
        self._needs[slot] = needs_of(params)
        self._num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._num_prompt_logprobs[slot] = params.prompt_logprobs or 0
        self._masks.admit(slot, request)
        if not uses_state:
            return
        bias = bias_arrays(params)
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

    def _call_sampler(
        self,
        shape: SampleShape,
        hidden: jax.Array,
        numbers: np.ndarray | jax.Array,
        mask: tuple[np.ndarray | jax.Array, ...],
        step: int = 0,
    ) -> tuple[jax.Array, ...]:
        num_arrays = num_state_arrays(shape)
        sampled, state = self._programs[shape.name](
            self._weights.head, self._state[:num_arrays], hidden, numbers, self._step_numbers[step], *mask
        )
        self._state = (*state, *self._state[num_arrays:])
        return sampled

    def _mask_of(self, shape: SampleShape, masked: dict[int, np.ndarray]) -> tuple[np.ndarray, ...]:
        """The sampler's mask, if it takes one."""
        return (self._masks.stack(masked, shape.num_rows),) if has_processors(shape.variant) else ()

    def _forward_shape(self, plan: StepPlan) -> ForwardShape:
        lattice = self._settings.lattice
        if plan.scores_prompts:
            assert plan.num_tokens <= lattice.scoring.num_tokens, "the scheduler keeps to the scoring budget"
            return lattice.scoring
        return lattice.step(plan.num_tokens, len(plan.entries), plan.num_steps)

    def _sampler_inputs(
        self, plan: StepPlan, allowed: Mapping[int, np.ndarray] | None = None
    ) -> SamplerInputs | None:
        """What the sampler is told of the entries, row i being entry i; None if none of them samples."""
        entries = plan.entries
        idle = [row for row, entry in enumerate(entries) if not entry.samples]
        if len(idle) == len(entries):
            return None
        masked, stuck = self._masks.rows(entries), ()
        if allowed:
            masked, stuck = intersect(masked, allowed)
        slots = np.array([entry.slot for entry in entries])
        needs, num_logprobs = self._needs[slots], self._num_logprobs[slots]
        needs[idle], num_logprobs[idle] = 0, -1
        variant = variant_for(int(np.bitwise_or.reduce(needs)) | (NEEDS_PROCESSORS if masked else 0))
        shape = self._settings.lattice.sample(len(entries), variant, bool(num_logprobs.max() >= 0))
        slots = np.pad(slots, (0, shape.num_rows - len(entries)), constant_values=self._dummy_slot)
        ints, floats = self._ints[slots], self._floats[slots]
        ints[: len(entries), POSITION] = [entry.start + len(entry.token_ids) for entry in entries]
        ints[: len(entries), NUM_STEPS] = [entry.num_steps for entry in entries]
        ints[idle, FLAGS] &= ~FLAG_ACTIVE
        ints[idle, SLOT] = self._dummy_slot
        return SamplerInputs(_pack_rows(ints, floats), self._mask_of(shape, masked), shape, stuck)

    def _sample(self, inputs: SamplerInputs, hidden: jax.Array, step: int) -> tuple[jax.Array, ...]:
        """Queue the sampler, and the way of its results to the host."""
        num_rows = inputs.shape.num_rows
        if hidden.shape[0] != num_rows:
            hidden = self._programs[resize_program(hidden.shape[0], num_rows)](hidden)
        sampled = self._call_sampler(inputs.shape, hidden, inputs.numbers, inputs.mask, step)
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


def _pack_rows(ints: np.ndarray, floats: np.ndarray) -> np.ndarray:
    """A sampler's rows as one array, for one transfer: [B, NUM_INTS + NUM_FLOATS] int32."""
    return np.concatenate([ints, floats.view(np.int32)], axis=1)


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
