"""What one step tells the sampler about each of its rows: layout, and how the host fills it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import numpy as np

from jaxserve.errors import RequestError
from jaxserve.sampling_params import MAX_LOGIT_BIAS, SamplingParams

Variant = Literal["greedy", "temperature", "top_k", "random", "full_top_k", "full"]
# From the cheapest to the dearest; "full" does all that the others do.
VARIANTS: tuple[Variant, ...] = ("greedy", "temperature", "top_k", "random", "full_top_k", "full")

# What rows can need beyond the most likely token, as bits: a batch needs the union of its rows' bits.
NEEDS_DRAW = 1  # a draw from the whole vocabulary
NEEDS_TOP_K = 2  # filters, among the MAX_TOP_K largest logits
NEEDS_PROCESSORS = 4  # mask, logit_bias and penalties
_ABILITIES: dict[Variant, int] = {
    "greedy": 0,
    "temperature": NEEDS_DRAW,
    "top_k": NEEDS_TOP_K,
    "random": NEEDS_DRAW | NEEDS_TOP_K,
    "full_top_k": NEEDS_TOP_K | NEEDS_PROCESSORS,
    "full": NEEDS_DRAW | NEEDS_TOP_K | NEEDS_PROCESSORS,
}

MAX_TOP_K = 64  # the largest top_k that the variants "top_k" and "full_top_k" take

# Columns of SamplingRows.ints and .floats.
SLOT, POSITION, SEED_LO, SEED_HI, TOP_K, FLAGS, NUM_STEPS = range(7)
NUM_INTS = 7
TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(6)
NUM_FLOATS = 6

FLAG_ACTIVE = 1  # the row samples a token in this step
FLAG_STATE = 2  # the row's slot was admitted: its bias and token counts are this sequence's own
FLAG_LOGPROBS = 4  # somebody reads the row's log-probabilities

_MAX_BIAS = 1e30  # larger biases mean the same, and would overflow float32


@partial(jax.tree_util.register_dataclass, data_fields=["ints", "floats", "allowed_mask"], meta_fields=[])
@dataclass(frozen=True)
class SamplingRows:
    """One step's sampling parameters, B rows.  Two arrays rather than twelve: fewer uploads a step."""

    ints: jax.Array  # [B, NUM_INTS] int32
    floats: jax.Array  # [B, NUM_FLOATS] float32
    allowed_mask: jax.Array | None = None  # [B, mask_words(V)] uint32, bit 1: allowed; see has_processors

    @property
    def slot(self) -> jax.Array:  # [B] int32
        return self.ints[:, SLOT]

    @property
    def position(self) -> jax.Array:  # [B] uint32
        return _as_uint32(self.ints[:, POSITION])

    @property
    def seed_lo(self) -> jax.Array:  # [B] uint32
        return _as_uint32(self.ints[:, SEED_LO])

    @property
    def seed_hi(self) -> jax.Array:  # [B] uint32
        return _as_uint32(self.ints[:, SEED_HI])

    @property
    def top_k(self) -> jax.Array:  # [B] int32, below 1: off
        return self.ints[:, TOP_K]

    @property
    def is_active(self) -> jax.Array:  # [B] bool
        return (self.ints[:, FLAGS] & FLAG_ACTIVE) != 0

    @property
    def uses_state(self) -> jax.Array:  # [B] bool
        return (self.ints[:, FLAGS] & FLAG_STATE) != 0

    @property
    def wants_logprobs(self) -> jax.Array:  # [B] bool
        return (self.ints[:, FLAGS] & FLAG_LOGPROBS) != 0

    @property
    def temperature(self) -> jax.Array:  # [B] float32, exactly 0 for greedy rows (vLLM's rule: below 1e-5)
        temperature = self.floats[:, TEMPERATURE]
        return jax.numpy.where(temperature < 1e-5, 0.0, temperature)

    @property
    def top_p(self) -> jax.Array:  # [B] float32
        return self.floats[:, TOP_P]

    @property
    def min_p(self) -> jax.Array:  # [B] float32
        return self.floats[:, MIN_P]

    @property
    def presence(self) -> jax.Array:  # [B] float32
        return self.floats[:, PRESENCE]

    @property
    def frequency(self) -> jax.Array:  # [B] float32
        return self.floats[:, FREQUENCY]

    @property
    def repetition(self) -> jax.Array:  # [B] float32
        return self.floats[:, REPETITION]


def needs_state(params: SamplingParams) -> bool:
    """Whether a sequence's slot must be admitted (sampler_state.admit_chunk) before it samples."""
    return bool(params.logit_bias) or params.has_penalties


def needs_of(params: SamplingParams) -> int:
    """What `sample` must be able to do for these parameters, as NEEDS_ bits.

    A row that carries a mask in this step (allowed_token_ids, bad_words, min_tokens, a grammar) needs
    NEEDS_PROCESSORS too; only the caller knows whether min_tokens or bad_words still bear on the step.
    """
    needs = NEEDS_PROCESSORS if needs_state(params) or params.allowed_token_ids is not None else 0
    if params.is_greedy:
        return needs
    if 0 < params.top_k <= MAX_TOP_K:
        return needs | NEEDS_TOP_K
    has_filter = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return needs | NEEDS_DRAW | (NEEDS_TOP_K if has_filter else 0)


def variant_for(needs: int) -> Variant:
    """The cheapest variant of `sample` that can do all of this union of NEEDS_ bits."""
    return next(variant for variant in VARIANTS if not needs & ~_ABILITIES[variant])


def covers(variant: Variant, wanted: Variant) -> bool:
    """Whether `variant` does all that `wanted` does."""
    return not _ABILITIES[wanted] & ~_ABILITIES[variant]


def has_processors(variant: Variant) -> bool:
    """Whether the variant takes a mask and all of the sampler state: it applies logit_bias and penalties."""
    return bool(_ABILITIES[variant] & NEEDS_PROCESSORS)


def fill_row(
    ints: np.ndarray,
    floats: np.ndarray,
    row: int,
    params: SamplingParams,
    *,
    slot: int,
    position: int,
    is_active: bool,
    uses_state: bool,
) -> None:
    """Write one sequence into ints [B, NUM_INTS] int32 and floats [B, NUM_FLOATS] float32.

    `position` is where the sampled token will stand in its sequence (prompt tokens counted): with the seed it
    decides the randomness.  `uses_state`: the slot was admitted for this sequence.  `params.seed` must be
    set.
    """
    if params.seed is None:
        raise RequestError("seed must be set before a sequence is sampled, got None.", param="seed")
    seed = params.seed & (2**64 - 1)
    flags = (FLAG_ACTIVE if is_active else 0) | (FLAG_STATE if uses_state else 0)
    top_k = min(params.top_k, 2**31 - 1)
    ints[row] = (slot, position, _as_int32(seed), _as_int32(seed >> 32), top_k, flags, 1)
    floats[row] = (
        params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    )


def fill_padding(ints: np.ndarray, floats: np.ndarray, num_slots: int) -> None:
    """Make every row an inactive greedy one at the dummy slot (index num_slots)."""
    ints[:] = 0
    ints[:, SLOT] = num_slots
    floats[:] = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def at_step(ints: jax.Array, step: jax.Array) -> jax.Array:
    """Inside jit: ints [B, NUM_INTS] as they are in step [] of a burst; rows that are through are inactive."""
    takes_part = step < ints[:, NUM_STEPS]
    flags = jax.numpy.where(takes_part, ints[:, FLAGS], ints[:, FLAGS] & ~FLAG_ACTIVE)
    return ints.at[:, POSITION].add(step).at[:, FLAGS].set(flags)


def bias_arrays(params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """logit_bias as the padded (ids int32, values float32) of a state row, each [MAX_LOGIT_BIAS]."""
    ids = np.zeros(MAX_LOGIT_BIAS, np.int32)
    values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    for i, (token_id, bias) in enumerate((params.logit_bias or {}).items()):
        ids[i], values[i] = token_id, min(max(bias, -_MAX_BIAS), _MAX_BIAS)
    return ids, values


def mask_words(vocab_size: int) -> int:
    """Width of an allowed_mask row in uint32 words: token t is bit t % 32 of word t // 32."""
    return -(-vocab_size // 32)


def allow_all(mask_row: np.ndarray) -> None:
    """Allow every token in a mask row [mask_words(V)] uint32."""
    mask_row[:] = 0xFFFFFFFF


def allow_only(mask_row: np.ndarray, token_ids: Iterable[int]) -> None:
    """Forbid every token of a mask row but these."""
    ids = np.fromiter(token_ids, np.int64)
    mask_row[:] = 0
    np.bitwise_or.at(mask_row, ids // 32, _bits(ids))


def forbid(mask_row: np.ndarray, token_ids: Iterable[int]) -> None:
    """Forbid these tokens in a mask row, besides those it forbids already."""
    ids = np.fromiter(token_ids, np.int64)
    np.bitwise_and.at(mask_row, ids // 32, ~_bits(ids))


def _bits(ids: np.ndarray) -> np.ndarray:
    return np.uint32(1) << (ids % 32).astype(np.uint32)


def _as_int32(value: int) -> int:
    """The low 32 bits of `value`, read as a signed number."""
    low = value & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low


def _as_uint32(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jax.numpy.uint32)
