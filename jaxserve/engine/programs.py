"""The functions that are compiled, one program a lattice shape, and how to lower each.

Programs take and return flat tuples of arrays: what pytrees they stand for is known here alone, and a serialised
program needs no class of ours to be found again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from jaxserve.engine.spread import Spread
from jaxserve.engine.vocab_shards import VocabShards
from jaxserve.engine.weight_pack import WeightPack
from jaxserve.engine.xla_options import LIBRARY_ROWS
from jaxserve.kernels_pallas import experts
from jaxserve.kernels_pallas.attention import HOPPER_TOKENS, backend_of, make_ready
from jaxserve.kernels_pallas.matmul import from_rows
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.image_tokens import ImageTokens
from jaxserve.models.layers import CONTRACTED_AXES, take_rows
from jaxserve.sampling_params import MAX_LOGIT_BIAS

ADMIT_CHUNK = 1024  # tokens of one admit call
ADMIT = "admit"
ASSIGN_CHUNK = 256  # pages of one assign call
ASSIGN = "assign_pages"
PROMPT_LOGPROBS = "prompt_logprobs"  # scores prompt tokens from the hidden states of a scoring step
_STATE_FIELDS = tuple(field.name for field in dataclasses.fields(SamplerState))


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
    """All programs of one engine, from its settings and the model's graph definition and abstract weights.

    Of a model over several devices the graph is that of one device's part, and the weights' shardings say which devices
    (on_devices.abstract_on_devices).  Every device then runs the same program on what it has of the arguments.
    """

    def __init__(
        self, settings: Settings, graphdef: nnx.GraphDef[DecoderModel], abstract_state: nnx.State
    ) -> None:
        self._settings = settings
        self._graphdef = graphdef
        leaves, self._treedef = jax.tree.flatten(abstract_state)
        model, layout = settings.model, settings.layout
        self._spread = Spread(leaves[0].sharding)
        self._shards: VocabShards | None = None
        if layout.num_devices > 1:
            self._shards = VocabShards(layout.part, model.vocab_size, layout.local.vocab_size)
        self._backend: Backend = backend_of(settings.platform, settings.dtype, model.head_dim)
        make_ready(self._backend, settings.dtype)
        if model.experts is not None:
            experts.make_ready(self._backend, settings.dtype)
        contracted = _contracted_axes(abstract_state) if self._backend == "cpu" else {}
        self._pack = WeightPack.plan(leaves, contracted)
        self._leaf_specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        self._head = self._find_head(abstract_state)
        self._head_spec = self._pack.leaf_spec(self._head)
        page = (settings.memory.num_pages, settings.page_size, layout.num_slots, 2, model.head_dim)
        kv_axes = ("pages", "page_tokens", "kv_heads", "key_value", "head_dim")
        self.kv_specs = (self._spread.spec(page, settings.kv_dtype, *kv_axes),) * model.num_layers
        self.page_table_spec = self._spread.spec(
            (settings.max_num_seqs + 1, settings.lattice.max_pages), jnp.int32
        )
        # Models that see take one argument more, at the end: the tokens that images became.
        self.image_cache_specs: tuple[jax.ShapeDtypeStruct, ...] = ()
        if settings.tower is not None:
            rows = settings.tower.cache_rows + 1
            self.image_cache_specs = (self._spread.spec((rows, model.hidden_size), settings.dtype),)
        state = jax.eval_shape(lambda: init_state(settings.max_num_seqs, layout.vocab_size))
        self.state_specs = tuple(
            self._spread.spec(x.shape, x.dtype, *(("slots", "vocab") if name == "tokens_seen" else ()))
            for name, x in zip(_STATE_FIELDS, state_to_tuple(state), strict=True)
        )

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
        head = self._pack.leaf(model, self._head)
        sharding = self._head_spec.sharding
        return Weights(model, head if sharding is None else jax.device_put(head, sharding))

    def put(self, tree: Any) -> Any:
        """Arrays of the host where programs take them from, in one transfer."""
        return self._spread.put(tree)

    def _lower(
        self, function: Callable[..., Any], *args: Any, donate: int | tuple[int, ...] = (), outs: Any = None
    ) -> jax.stages.Lowered:
        """Lower a function of what one device has of `args`; `outs` as Spread.program has them."""
        program = self._spread.program(function, args, outs)
        return jax.jit(program, donate_argnums=donate).lower(*args)

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

        def forward(weights, kv_pages, page_table, last_token, vector, step, *image_cache):
            batch = unpack(vector, step, shape, page_table, self._backend)
            token_ids = jnp.where(batch.token_ids >= 0, batch.token_ids, last_token[batch.slots])
            sampled = batch.sample_index if shape.kind == "mixed" and not shape.scores_prompts else None
            images = None if batch.images is None else ImageTokens(*batch.images, *image_cache)
            hidden, kv_pages = self._model(weights)(token_ids, kv_pages, batch.meta, sampled, images)
            if shape.scores_prompts:
                return take_rows(hidden, batch.sample_index), hidden, kv_pages, batch.page_table
            return hidden, kv_pages, batch.page_table

        return forward

    def _lower_forward(self, shape: ForwardShape) -> jax.stages.Lowered:
        return self._lower(
            self._forward(shape),
            self._pack.specs,
            self.kv_specs,
            self.page_table_spec,
            self.state_specs[0],
            self._spread.spec((vector_length(shape),), jnp.int32),
            self._spread.spec((), jnp.int32),
            *self.image_cache_specs,
            donate=(1, 2),
            outs=(*[None] * (2 if shape.scores_prompts else 1), self.kv_specs, None),
        )

    def _sampler(self, shape: SampleShape) -> Callable[..., tuple[Any, ...]]:
        """A sampler, to be traced."""
        settings = self._settings
        on_cpu = settings.platform == "cpu"

        def sample_rows(head, state, hidden, numbers, step, *mask):
            logits = self._logits(head, hidden)
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
                shards=self._shards,
            )
            results = (out.ids,)
            if shape.with_logprobs:
                results += _logprobs(logits, rows, out.ids)
            return results, state_to_tuple(new_state)[: len(state)]

        def _logprobs(logits, rows, ids):
            def gather():
                return logprobs_to_tuple(gather_logprobs(logits, ids, settings.max_logprobs, self._shards))

            if not on_cpu:
                return gather()
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gather))
            return lax.cond(rows.wants_logprobs.any(), gather, lambda: nothing)

        return sample_rows

    def _lower_sample(self, shape: SampleShape) -> jax.stages.Lowered:
        settings = self._settings
        rows = shape.num_rows
        state_specs = self.state_specs[: num_state_arrays(shape)]
        args = [
            self._head_spec,
            state_specs,
            self._spread.spec((rows, settings.model.hidden_size), settings.dtype),
            self._spread.spec((rows, NUM_INTS + NUM_FLOATS), jnp.int32),
            self._spread.spec((), jnp.int32),
        ]
        if has_processors(shape.variant):
            args.append(self._spread.spec((rows, mask_words(settings.model.vocab_size)), jnp.uint32))
        return self._lower(self._sampler(shape), *args, donate=1, outs=(None, state_specs))

    def _logits(self, head: jax.Array, hidden: jax.Array) -> jax.Array:
        """Inside a program: of hidden rows [R, D], this device's logits [R, V], -inf for tokens that only pad."""
        logits = self._head_model(head).logits(hidden, self._backend)
        return logits if self._shards is None else self._shards.without_padding(logits)

    def _lower_burst(self, shape: BurstShape) -> jax.stages.Lowered:
        forward, sampler = self._forward(shape.forward), self._sampler(shape.sample)
        rows, state_specs = shape.sample.num_rows, self.state_specs[: num_state_arrays(shape.sample)]

        def burst(weights, head, kv_pages, page_table, state, vector, numbers, *image_cache):
            def run_step(step, carry):
                kv_pages, page_table, state, ids = carry
                hidden, kv_pages, page_table = forward(
                    weights, kv_pages, page_table, state[0], vector, step, *image_cache
                )
                (sampled,), state = sampler(head, state, _resize(hidden, rows), numbers, step)
                return kv_pages, page_table, state, ids.at[step].set(sampled)

            ids = jnp.zeros((MAX_BURST, rows), jnp.int32)
            # The number of steps is fixed: where it is not, a GPU asks the host after each whether to go on.
            *rest, ids = lax.fori_loop(0, MAX_BURST, run_step, (kv_pages, page_table, state, ids))
            return ids, *rest

        return self._lower(
            burst,
            self._pack.specs,
            self._head_spec,
            self.kv_specs,
            self.page_table_spec,
            state_specs,
            self._spread.spec((vector_length(shape.forward),), jnp.int32),
            self._spread.spec((rows, NUM_INTS + NUM_FLOATS), jnp.int32),
            *self.image_cache_specs,
            donate=(2, 3, 4),
            outs=(None, self.kv_specs, None, state_specs),
        )

    def _lower_prompt_logprobs(self) -> jax.stages.Lowered:
        settings = self._settings
        lattice = settings.lattice
        chunk = lattice.prompt_chunk

        def score(head, hidden, start, target_ids):
            padded = jnp.pad(hidden, ((0, chunk), (0, 0)))  # a chunk may begin near the end
            rows = lax.dynamic_slice_in_dim(padded, start, chunk)
            scores = prompt_logprobs(
                self._logits(head, rows), target_ids, settings.max_logprobs, self._shards
            )
            return logprobs_to_tuple(scores)

        hidden = self._spread.spec((lattice.scoring.num_tokens, settings.model.hidden_size), settings.dtype)
        numbers = self._spread.spec((), jnp.int32), self._spread.spec((chunk,), jnp.int32)
        return self._lower(score, self._head_spec, hidden, *numbers)

    def _lower_resize(self, given: int, taken: int) -> jax.stages.Lowered:
        hidden = self._spread.spec((given, self._settings.model.hidden_size), self._settings.dtype)
        return self._lower(partial(_resize, num_rows=taken), hidden)

    def _lower_assign(self) -> jax.stages.Lowered:
        def assign(page_table, slots, places, pages):
            return page_table.at[slots, places].set(pages)

        numbers = self._spread.spec((ASSIGN_CHUNK,), jnp.int32)
        return self._lower(assign, self.page_table_spec, numbers, numbers, numbers, donate=0)

    def _lower_admit(self) -> jax.stages.Lowered:
        def admit(state, slot, token_ids, num_prompt, num_valid, is_first, bias_ids, bias_values):
            if self._shards is not None:
                token_ids = self._shards.local_ids(token_ids)
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

        number = self._spread.spec((), jnp.int32)
        return self._lower(
            admit,
            self.state_specs,
            number,
            self._spread.spec((ADMIT_CHUNK,), jnp.int32),
            number,
            number,
            self._spread.spec((), jnp.bool_),
            self._spread.spec((MAX_LOGIT_BIAS,), jnp.int32),
            self._spread.spec((MAX_LOGIT_BIAS,), jnp.float32),
            donate=0,
            outs=self.state_specs,
        )


def state_to_tuple(state: SamplerState) -> tuple[jax.Array, ...]:
    """The sampler state's arrays in the order of SamplerState's fields; `last_token` comes first."""
    return tuple(getattr(state, name) for name in _STATE_FIELDS)


def num_state_arrays(shape: SampleShape) -> int:
    """How many of the sampler state's arrays a sampler takes and gives back: few look beyond the first."""
    return len(_STATE_FIELDS) if has_processors(shape.variant) else 1


def _state_from_tuple(arrays: tuple[jax.Array, ...]) -> SamplerState:
    """The state, whose missing arrays nobody will look at."""
    missing = [None] * (len(_STATE_FIELDS) - len(arrays))
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
