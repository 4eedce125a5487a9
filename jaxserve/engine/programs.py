"""The functions that are compiled, one program a lattice shape: their names, and how to lower each.

Programs take and return flat tuples of arrays: what pytrees they stand for is known to forward_programs and
sampler_programs alone, and a serialised program needs no class of ours to be found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.engine.batch import vector_length
from jaxserve.engine.forward_programs import ForwardPrograms
from jaxserve.engine.lattice import BurstShape, ForwardShape
from jaxserve.engine.pace import MAX_BURST
from jaxserve.engine.packed_model import PackedModel
from jaxserve.engine.sampler_programs import SamplerPrograms
from jaxserve.engine.settle import Settings
from jaxserve.engine.spread import Spread
from jaxserve.engine.xla_options import LIBRARY_ROWS
from jaxserve.kernels_pallas import experts
from jaxserve.kernels_pallas.attention import HOPPER_TOKENS, backend_of, make_ready
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.models.decoder import DecoderModel

ADMIT = "admit"
ASSIGN = "assign_pages"
PROMPT_LOGPROBS = "prompt_logprobs"  # scores prompt tokens from the hidden states of a scoring step


@dataclass(frozen=True, slots=True)
class Program:
    """Something to compile: its name in the cache, and how to trace and lower it."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    rows: int = 0  # of its matrix products' activations; 0 without any
    products: str = ""  # of programs that name the same ones, what one has tuned serves the others


class ProgramBook:
    """All programs of one engine, from its settings and the model's graph definition and abstract weights.

    Of a model over several devices the graph is that of one device's part, and the weights' shardings say which devices
    (on_devices.abstract_on_devices).  Every device then runs the same program on what it has of the arguments.
    """

    def __init__(
        self, settings: Settings, graphdef: nnx.GraphDef[DecoderModel], abstract_state: nnx.State
    ) -> None:
        self._settings = settings
        model = settings.model
        backend: Backend = backend_of(settings.platform, model.head_dim)
        make_ready(backend, settings.dtype)
        if model.experts is not None:
            experts.make_ready(backend, settings.dtype)
        spread = Spread(jax.tree.leaves(abstract_state)[0].sharding)
        packed = PackedModel(graphdef, abstract_state, is_tied=model.tie_word_embeddings, backend=backend)
        self._spread = spread
        self._packed = packed
        self._forwards = ForwardPrograms(settings, packed, spread, backend)
        self._samplers = SamplerPrograms(settings, packed, spread, backend)
        self.pack = packed.pack  # a model's parameters as the programs take them
        self.put = spread.put  # arrays of the host where programs take them from
        self.kv_specs = self._forwards.kv_specs
        self.page_table_spec = self._forwards.page_table_spec
        self.image_cache_specs = self._forwards.image_cache_specs
        self.state_specs = self._samplers.state_specs

    def __iter__(self) -> Iterator[Program]:
        lattice = self._settings.lattice
        last_token = self.state_specs[0]
        # The slowest first, so that the last core does not end with one of them.
        for shape in sorted(lattice.forwards, key=self._is_quick):
            rows = shape.num_tokens
            lower = partial(self._forwards.lower, shape, last_token)
            yield Program(shape.name, lower, rows, self._tuned("layers", rows))
        for shape in lattice.samples:
            rows = shape.num_rows
            yield Program(shape.name, partial(self._samplers.lower, shape), rows, self._tuned("head", rows))
        for shape in lattice.bursts:
            rows = shape.forward.num_tokens
            yield Program(shape.name, partial(self._lower_burst, shape), rows, self._tuned("layers", rows))
        rows = lattice.prompt_chunk
        yield Program(PROMPT_LOGPROBS, self._samplers.lower_prompt_logprobs, rows, self._tuned("head", rows))
        for given, taken in lattice.resizes():
            yield Program(resize_program(given, taken), partial(self._lower_resize, given, taken))
        yield Program(ADMIT, self._samplers.lower_admit)
        yield Program(ASSIGN, self._forwards.lower_assign)

    def _tuned(self, weights: str, rows: int) -> str:
        """Name of the products of these weights with so many rows; only XLA's own kernels for GPUs are tuned."""
        return f"{weights}_{rows}" if self._settings.platform == "gpu" and rows < LIBRARY_ROWS else ""

    def _is_quick(self, forward: ForwardShape) -> bool:
        """Whether it compiles sooner than others: with a kernel less, or without a slow one, or any to try."""
        if self._settings.platform == "gpu":
            return LIBRARY_ROWS <= forward.num_tokens < HOPPER_TOKENS
        return forward.kind == "decode"

    def _lower_burst(self, shape: BurstShape) -> jax.stages.Lowered:
        forward, sampler = self._forwards.forward(shape.forward), self._samplers.sampler(shape.sample)
        rows, state_specs = shape.sample.num_rows, self._samplers.specs_of(shape.sample)

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

        return self._spread.lower(
            burst,
            self._packed.specs,
            self._packed.head_spec,
            self.kv_specs,
            self.page_table_spec,
            state_specs,
            self._spread.spec((vector_length(shape.forward),), jnp.int32),
            self._samplers.numbers_spec(shape.sample),
            *self.image_cache_specs,
            donate=(2, 3, 4),
            outs=(None, self.kv_specs, None, state_specs),
        )

    def _lower_resize(self, given: int, taken: int) -> jax.stages.Lowered:
        hidden = self._spread.spec((given, self._settings.model.hidden_size), self._settings.dtype)
        return self._spread.lower(partial(_resize, num_rows=taken), hidden)


def resize_program(given: int, taken: int) -> str:
    """Name of the program that cuts or pads hidden rows."""
    return f"resize_{given}_{taken}"


def _resize(hidden: jax.Array, num_rows: int) -> jax.Array:
    """hidden [R, D] cut or padded to `num_rows` rows."""
    given = hidden.shape[0]
    return hidden[:num_rows] if num_rows <= given else jnp.pad(hidden, ((0, num_rows - given), (0, 0)))
