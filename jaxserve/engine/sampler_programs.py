"""Samplers, to be traced and lowered, and what else reads the output head or the sampler state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.engine.lattice import SampleShape
from jaxserve.engine.logprobs import Logprobs, gather_logprobs
from jaxserve.engine.packed_model import PackedModel
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
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.sampling_params import MAX_LOGIT_BIAS

ADMIT_CHUNK = 1024  # tokens of one admit call
_STATE_FIELDS = tuple(field.name for field in dataclasses.fields(SamplerState))


class SamplerPrograms:
    """What makes tokens of hidden states."""

    def __init__(self, settings: Settings, packed: PackedModel, spread: Spread, backend: Backend) -> None:
        self._settings = settings
        self._packed = packed
        self._spread = spread
        self._backend: Backend = backend
        layout = settings.layout
        self._shards: VocabShards | None = None
        if layout.num_devices > 1:
            self._shards = VocabShards(layout.part, settings.model.vocab_size, layout.local.vocab_size)
        state = jax.eval_shape(lambda: init_state(settings.max_num_seqs, layout.vocab_size))
        self.state_specs = tuple(
            spread.spec(x.shape, x.dtype, *(("slots", "vocab") if name == "tokens_seen" else ()))
            for name, x in zip(_STATE_FIELDS, state_to_tuple(state), strict=True)
        )

    def sampler(self, shape: SampleShape) -> Callable[..., tuple[Any, ...]]:
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
            ids, new_state = sample(
                logits,
                rows,
                _state_from_tuple(state),
                variant=shape.variant,
                on_cpu=on_cpu,
                on_gpu=settings.platform == "gpu",
                shards=self._shards,
            )
            results = (ids,)
            if shape.with_logprobs:
                results += _logprobs(logits, rows, ids)
            return results, state_to_tuple(new_state)[: len(state)]

        def _logprobs(logits, rows, ids):
            def gather():
                return _logprobs_to_tuple(gather_logprobs(logits, ids, settings.max_logprobs, self._shards))

            if not on_cpu:
                return gather()
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gather))
            return lax.cond(rows.wants_logprobs.any(), gather, lambda: nothing)

        return sample_rows

    def lower(self, shape: SampleShape) -> jax.stages.Lowered:
        """One sampler."""
        settings = self._settings
        state_specs = self.specs_of(shape)
        args = [
            self._packed.head_spec,
            state_specs,
            self._spread.spec((shape.num_rows, settings.model.hidden_size), settings.dtype),
            self.numbers_spec(shape),
            self._spread.spec((), jnp.int32),
        ]
        if has_processors(shape.variant):
            words = mask_words(settings.model.vocab_size)
            args.append(self._spread.spec((shape.num_rows, words), jnp.uint32))
        return self._spread.lower(self.sampler(shape), *args, donate=1, outs=(None, state_specs))

    def specs_of(self, shape: SampleShape) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of the sampler state's arrays that a sampler takes and gives back."""
        return self.state_specs[: num_state_arrays(shape)]

    def numbers_spec(self, shape: SampleShape) -> jax.ShapeDtypeStruct:
        """Of what a sampler is told about its rows."""
        return self._spread.spec((shape.num_rows, NUM_INTS + NUM_FLOATS), jnp.int32)

    def lower_prompt_logprobs(self) -> jax.stages.Lowered:
        """Scores of a chunk of prompt tokens, from the hidden states of a scoring step."""
        settings = self._settings
        lattice = settings.lattice
        chunk = lattice.prompt_chunk

        def score(head, hidden, start, target_ids):
            padded = jnp.pad(hidden, ((0, chunk), (0, 0)))  # a chunk may begin near the end
            rows = lax.dynamic_slice_in_dim(padded, start, chunk)
            scores = gather_logprobs(
                self._logits(head, rows), target_ids, settings.max_logprobs, self._shards
            )
            return _logprobs_to_tuple(scores)

        hidden = self._spread.spec((lattice.scoring.num_tokens, settings.model.hidden_size), settings.dtype)
        numbers = self._spread.spec((), jnp.int32), self._spread.spec((chunk,), jnp.int32)
        return self._spread.lower(score, self._packed.head_spec, hidden, *numbers)

    def lower_admit(self) -> jax.stages.Lowered:
        """A slot's row of the state, told about the sequence that takes it."""

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
        return self._spread.lower(
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

    def _logits(self, head: jax.Array, hidden: jax.Array) -> jax.Array:
        """Inside a program: of hidden rows [R, D], this device's logits [R, V], -inf for tokens that only pad."""
        logits = self._packed.head_model(head).logits(hidden, self._backend)
        return logits if self._shards is None else self._shards.without_padding(logits)


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


def _logprobs_to_tuple(logprobs: Logprobs) -> tuple[jax.Array, ...]:
    """The arrays in the order in which the runner reads them."""
    return (logprobs.logprob, logprobs.rank, logprobs.top_ids, logprobs.top_logprobs)
