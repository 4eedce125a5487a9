"""The functions that are compiled, one program a lattice shape, and how to lower each.

Programs take and return flat tuples of arrays: what pytrees they stand for is known here alone, and a serialised
program needs no class of ours to be found again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.engine.batch import unpack, vector_length
from jaxserve.engine.lattice import BurstShape, ForwardShape, SampleShape
from jaxserve.engine.logprobs import Logprobs, gather_logprobs, prompt_logprobs
from jaxserve.engine.pace import MAX_BURST
from jaxserve.engine.sampler_state import SamplerState, admit_chunk, init_state
from jaxserve.engine.sampling import sample
from jaxserve.engine.sampling_rows import (
    NUM_FLOATS,
    NUM_INTS,
    SamplingRows,
    at_step,
    has_processors,
    mask_words,
)
from jaxserve.engine.settle import Settings
from jaxserve.engine.weight_pack import WeightPack
from jaxserve.engine.xla_options import LIBRARY_ROWS
from jaxserve.kernels_pallas import experts
from jaxserve.kernels_pallas.attention import HOPPER_TOKENS, backend_of, make_ready
from jaxserve.kernels_pallas.matmul import from_rows
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.layers import CONTRACTED_AXES, take_rows
from jaxserve.sampling_params import MAX_LOGIT_BIAS

ADMIT_CHUNK = 1024  # tokens of one admit call
ADMIT = "admit"
ASSIGN_CHUNK = 256  # pages of one assign call
ASSIGN = "assign_pages"
PROMPT_LOGPROBS = "prompt_logprobs"  # scores prompt tokens from the hidden states of a scoring step


@dataclass(frozen=True, slots=True)
class Program:
    """Something to compile: its name in the cache, and how to trace and lower it."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    rows: int = 0  # of its matrix products' activations; 0 without any
    products: str = ""  # of programs that name the same ones, what one has tuned serves the others


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters on the device, as programs take them."""

    model: tuple[jax.Array, ...]  # of forward passes
    head: jax.Array  # of samplers: what turns hidden states into logits


class ProgramBook:
    """All programs of one engine, from its settings and the model's graph definition and abstract weights."""

    def __init__(
        self, settings: Settings, graphdef: nnx.GraphDef[DecoderModel], abstract_state: nnx.State
    ) -> None:
        self._settings = settings
        self._graphdef = graphdef
        leaves, self._treedef = jax.tree.flatten(abstract_state)
        model = settings.model
        self._backend: Backend = backend_of(settings.platform, settings.dtype, model.head_dim)
        make_ready(self._backend, settings.dtype)
        if model.experts is not None:
            experts.make_ready(self._backend, settings.dtype)
        contracted = _contracted_axes(abstract_state) if self._backend == "cpu" else {}
        self._pack = WeightPack.plan(leaves, contracted)
        self._leaf_specs = [_spec(leaf.shape, leaf.dtype) for leaf in leaves]
        self._head = self._find_head(abstract_state)
        self._head_spec = jax.eval_shape(lambda arrays: self._pack.leaf(arrays, self._head), self._pack.specs)
        page = (settings.memory.num_pages, settings.page_size, model.num_kv_heads, 2, model.head_dim)
        self.kv_specs = (_spec(page, settings.kv_dtype),) * model.num_layers
        self.page_table_spec = _spec((settings.max_num_seqs + 1, settings.lattice.max_pages), jnp.int32)
        state = jax.eval_shape(lambda: init_state(settings.max_num_seqs, model.vocab_size))
        self._state_specs = tuple(_spec(x.shape, x.dtype) for x in state_to_tuple(state))

    def __iter__(self) -> Iterator[Program]:
        lattice = self._settings.lattice
        # The slowest first, so that the last core does not end with one of them.
        for forward in sorted(lattice.forwards, key=self._is_quick):
            rows = forward.num_tokens
            yield Program(
                forward.name,
                lambda forward=forward: self._lower_forward(forward),
                rows,
                self._tuned("layers", rows),
            )
        for shape in lattice.samples:
            rows = shape.num_rows
            yield Program(
                shape.name, lambda shape=shape: self._lower_sample(shape), rows, self._tuned("head", rows)
            )
        for burst in lattice.bursts:
            rows = burst.forward.num_tokens
            yield Program(
                burst.name, lambda burst=burst: self._lower_burst(burst), rows, self._tuned("layers", rows)
            )
        rows = lattice.prompt_chunk
        yield Program(PROMPT_LOGPROBS, self._lower_prompt_logprobs, rows, self._tuned("head", rows))
        for given, taken in lattice.resizes():
            yield Program(
                resize_program(given, taken),
                lambda given=given, taken=taken: self._lower_resize(given, taken),
            )
        yield Program(ADMIT, self._lower_admit)
        yield Program(ASSIGN, self._lower_assign)

    def _tuned(self, weights: str, rows: int) -> str:
        """Name of the products of these weights with so many rows; only XLA's own kernels for GPUs are tuned."""
        return f"{weights}_{rows}" if self._settings.platform == "gpu" and rows < LIBRARY_ROWS else ""

    def _is_quick(self, forward: ForwardShape) -> bool:
        """Whether it compiles sooner than others: with a kernel less, or without a slow one, or any to try."""
        if self._settings.platform == "gpu":
            return LIBRARY_ROWS <= forward.num_tokens < HOPPER_TOKENS
        return forward.kind == "decode"

    def pack(self, state: nnx.State) -> Weights:
        """A model's parameters as the programs take them."""
        leaves = jax.tree.leaves(state)
        model = self._pack.pack(leaves)
        return Weights(model, self._pack.leaf(model, self._head))

    def _find_head(self, abstract_state: nnx.State) -> int:
        """Index of the leaf that DecoderModel.logits multiplies with."""
        name = "embedding" if self._settings.model.tie_word_embeddings else "lm_head"
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
        (index,) = (i for i, path in enumerate(paths) if getattr(path[0], "key", None) == name)
        return index

    def _model(self, weights: tuple[jax.Array, ...]) -> DecoderModel:
        leaves = self._pack.unpack(weights, keep_stacks=self._backend == "gpu")
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _head_model(self, head: jax.Array) -> DecoderModel:
        """A model that can do nothing but `logits`: its other parameters are shapes without values."""
        leaves: list[jax.Array | jax.ShapeDtypeStruct] = [*self._leaf_specs]
        axes = self._pack.contracted.get(self._head)
        leaves[self._head] = head if axes is None else from_rows(head, *axes)
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _forward(self, shape: ForwardShape) -> Callable[..., tuple[Any, ...]]:
        """A forward pass, to be traced."""

        def forward(weights, kv_pages, page_table, last_token, vector, step):
            batch = unpack(vector, step, shape, page_table, self._backend)
            token_ids = jnp.where(batch.token_ids >= 0, batch.token_ids, last_token[batch.slots])
            sampled = batch.sample_index if shape.kind == "mixed" and not shape.scores_prompts else None
            hidden, kv_pages = self._model(weights)(token_ids, kv_pages, batch.meta, sampled)
            if shape.scores_prompts:
                return take_rows(hidden, batch.sample_index), hidden, kv_pages, batch.page_table
            return hidden, kv_pages, batch.page_table

        return forward

    def _lower_forward(self, shape: ForwardShape) -> jax.stages.Lowered:
        vector = _spec((vector_length(shape),), jnp.int32)
        return jax.jit(self._forward(shape), donate_argnums=(1, 2)).lower(
            self._pack.specs,
            self.kv_specs,
            self.page_table_spec,
            self._state_specs[0],
            vector,
            _spec((), jnp.int32),
        )

    def _sampler(self, shape: SampleShape) -> Callable[..., tuple[Any, ...]]:
        """A sampler, to be traced."""
        settings = self._settings
        on_cpu = settings.platform == "cpu"

        def sample_rows(head, state, hidden, numbers, step, *mask):
            logits = self._head_model(head).logits(hidden, self._backend)
            rows = SamplingRows(
                ints=at_step(numbers[:, :NUM_INTS], step),
                floats=lax.bitcast_convert_type(numbers[:, NUM_INTS:], jnp.float32),
                allowed_mask=mask[0] if mask else None,
            )
            out, new_state = sample(
                logits,
                rows,
                _state_from_tuple(state),
                variant=shape.variant,
                num_logprobs=None,
                on_cpu=on_cpu,
                on_gpu=settings.platform == "gpu",
            )
            results = (out.ids,)
            if shape.with_logprobs:
                results += _logprobs(logits, rows, out.ids)
            return results, state_to_tuple(new_state)[: len(state)]

        def _logprobs(logits, rows, ids):
            def gather():
                return logprobs_to_tuple(gather_logprobs(logits, ids, settings.max_logprobs))

            if not on_cpu:
                return gather()
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gather))
            return lax.cond(rows.wants_logprobs.any(), gather, lambda: nothing)

        return sample_rows

    def _lower_sample(self, shape: SampleShape) -> jax.stages.Lowered:
        settings = self._settings
        rows = shape.num_rows
        args = [
            self._head_spec,
            self._state_specs[: num_state_arrays(shape)],
            _spec((rows, settings.model.hidden_size), settings.dtype),
            _spec((rows, NUM_INTS + NUM_FLOATS), jnp.int32),
            _spec((), jnp.int32),
        ]
        if has_processors(shape.variant):
            args.append(_spec((rows, mask_words(settings.model.vocab_size)), jnp.uint32))
        return jax.jit(self._sampler(shape), donate_argnums=1).lower(*args)

    def _lower_burst(self, shape: BurstShape) -> jax.stages.Lowered:
        forward, sampler = self._forward(shape.forward), self._sampler(shape.sample)
        rows, state_specs = shape.sample.num_rows, self._state_specs[: num_state_arrays(shape.sample)]

        def burst(weights, head, kv_pages, page_table, state, vector, numbers):
            def run_step(step, carry):
                kv_pages, page_table, state, ids = carry
                hidden, kv_pages, page_table = forward(weights, kv_pages, page_table, state[0], vector, step)
                (sampled,), state = sampler(head, state, _resize(hidden, rows), numbers, step)
                return kv_pages, page_table, state, ids.at[step].set(sampled)

            ids = jnp.zeros((MAX_BURST, rows), jnp.int32)
            # The number of steps is fixed: where it is not, a GPU asks the host after each whether to go on.
            *rest, ids = lax.fori_loop(0, MAX_BURST, run_step, (kv_pages, page_table, state, ids))
            return ids, *rest

        return jax.jit(burst, donate_argnums=(2, 3, 4)).lower(
            self._pack.specs,
            self._head_spec,
            self.kv_specs,
            self.page_table_spec,
            state_specs,
            _spec((vector_length(shape.forward),), jnp.int32),
            _spec((rows, NUM_INTS + NUM_FLOATS), jnp.int32),
        )

    def _lower_prompt_logprobs(self) -> jax.stages.Lowered:
        settings = self._settings
        lattice = settings.lattice
        chunk = lattice.prompt_chunk

        def score(head, hidden, start, target_ids):
            padded = jnp.pad(hidden, ((0, chunk), (0, 0)))  # a chunk may begin near the end
            rows = lax.dynamic_slice_in_dim(padded, start, chunk)
            logits = self._head_model(head).logits(rows, self._backend)
            return logprobs_to_tuple(prompt_logprobs(logits, target_ids, settings.max_logprobs))

        hidden = _spec((lattice.scoring.num_tokens, settings.model.hidden_size), settings.dtype)
        return jax.jit(score).lower(self._head_spec, hidden, _spec((), jnp.int32), _spec((chunk,), jnp.int32))

    def _lower_resize(self, given: int, taken: int) -> jax.stages.Lowered:
        hidden = _spec((given, self._settings.model.hidden_size), self._settings.dtype)
        return jax.jit(_resize, static_argnums=1).lower(hidden, taken)

    def _lower_assign(self) -> jax.stages.Lowered:
        def assign(page_table, slots, places, pages):
            return page_table.at[slots, places].set(pages)

        numbers = _spec((ASSIGN_CHUNK,), jnp.int32)
        return jax.jit(assign, donate_argnums=0).lower(self.page_table_spec, numbers, numbers, numbers)

    def _lower_admit(self) -> jax.stages.Lowered:
        def admit(state, slot, token_ids, num_prompt, num_valid, is_first, bias_ids, bias_values):
            return state_to_tuple(
                admit_chunk(
                    SamplerState(*state),
                    slot,
                    token_ids,
                    num_prompt,
                    num_valid,
                    is_first,
                    bias_ids,
                    bias_values,
                )
            )

        number = _spec((), jnp.int32)
        return jax.jit(admit, donate_argnums=0).lower(
            self._state_specs,
            number,
            _spec((ADMIT_CHUNK,), jnp.int32),
            number,
            number,
            _spec((), jnp.bool_),
            _spec((MAX_LOGIT_BIAS,), jnp.int32),
            _spec((MAX_LOGIT_BIAS,), jnp.float32),
        )


def state_to_tuple(state: SamplerState) -> tuple[jax.Array, ...]:
    """The sampler state's arrays in the order of SamplerState's fields; `last_token` comes first."""
    return (state.last_token, state.tokens_seen, state.bias_ids, state.bias_values)


def num_state_arrays(shape: SampleShape) -> int:
    """How many of the sampler state's arrays a sampler takes and gives back: few look beyond the first."""
    return len(dataclasses.fields(SamplerState)) if has_processors(shape.variant) else 1


def _state_from_tuple(arrays: tuple[jax.Array, ...]) -> SamplerState:
    """The state, whose missing arrays nobody will look at."""
    missing = [None] * (len(dataclasses.fields(SamplerState)) - len(arrays))
    return SamplerState(*arrays, *missing)  # type: ignore[arg-type]  # see num_state_arrays


def logprobs_to_tuple(logprobs: Logprobs) -> tuple[jax.Array, ...]:
    """The arrays in the order in which the runner reads them."""
    return (logprobs.logprob, logprobs.rank, logprobs.top_ids, logprobs.top_logprobs)


def _contracted_axes(abstract_state: nnx.State) -> dict[int, tuple[int, int]]:
    """Of each leaf that products read: which of its axes they contract, as matmul.to_rows wants to know it."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
    names = [[str(getattr(key, "key", getattr(key, "name", ""))) for key in path] for path in paths]
    known = [next((name for name in path if name in CONTRACTED_AXES), None) for path in names]
    return {index: CONTRACTED_AXES[name] for index, name in enumerate(known) if name is not None}


def _resize(hidden: jax.Array, num_rows: int) -> jax.Array:
    """hidden [R, D] cut or padded to `num_rows` rows."""
    given = hidden.shape[0]
    return hidden[:num_rows] if num_rows <= given else jnp.pad(hidden, ((0, num_rows - given), (0, 0)))


def resize_program(given: int, taken: int) -> str:
    """Name of the program that cuts or pads hidden rows."""
    return f"resize_{given}_{taken}"


def _spec(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))  # type: ignore[arg-type]  # dtype-like
