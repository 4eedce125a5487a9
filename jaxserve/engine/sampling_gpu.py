"""The filtered draw on a GPU: one launch, a program a row, that looks beyond a row's largest logits only if it must.

Where the filters leave no more than the candidates (the groups of 64 tokens with the largest logits) a program
works in registers alone.  Other rows read their logits again, some times each: a branch inside a kernel costs the
other rows nothing and leaves the CUDA graph whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.engine.sampling_noise import noise_of
from jaxserve.engine.vocab_search import GROUP, image_of, largest_groups, value_of

NUM_GROUPS = 64  # whose logits are a row's candidates
_CANDIDATES = NUM_GROUPS * GROUP
_NUM_WARPS = 8
_TILE = 1024  # logits that are summed at a time in a pass over a row
_UNROLLED = 4  # tiles that are asked for at a time, so that memory is busy
# Of a threshold, found by one pass over the candidates or the row; must divide 32.
_NARROW_BITS, _WIDE_BITS = 1, 4

Sums = Callable[[Sequence[jax.Array]], Sequence[jax.Array]]


def takes(size: int) -> bool:
    """Whether draw_rows takes rows of `size` logits: fewer are all candidates, and XLA does well with them."""
    return size > _CANDIDATES


def draw_rows(
    x: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p_slack: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    *,
    interpret: bool = False,
) -> jax.Array:
    """sampling_filters.draw_filtered for x [B, V] float32, V > 64 * NUM_GROUPS: token ids int32 [B].

    temperature, top_p, min_p_slack [B] float32: min_p keeps logits down to best + min_p_slack (-inf: all).
    top_k [B] int32, 1 to V.  keys: row_keys' words, uint32 [B].
    """
    batch, size = x.shape
    if not takes(size):
        raise ValueError(f"draw_rows needs more than {_CANDIDATES} logits a row, got {size}")
    chosen, edge = largest_groups(x, NUM_GROUPS)
    # What is below this weighs less than (1 - top_p) / e of the mass together: top_p's threshold is above.
    reach = temperature * (jnp.log1p(-jnp.minimum(top_p, 1 - 1e-7)) - np.log(size) - 1)
    whole = pl.BlockSpec(x.shape, lambda row: (0, 0))
    groups = pl.BlockSpec(chosen.shape, lambda row: (0, 0))
    scalars = [edge, temperature, top_k, top_p, min_p_slack, reach, *keys]
    scalar = pl.BlockSpec((batch,), lambda row: (0,))
    return pl.pallas_call(
        partial(_draw_row, size=size),
        grid=(batch,),
        in_specs=[whole, groups, *[scalar] * len(scalars)],
        out_specs=scalar,
        out_shape=jax.ShapeDtypeStruct((batch,), jnp.int32),
        compiler_params=pltriton.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="draw_rows",
    )(x, chosen, *scalars)


def _draw_row(
    x_ref,  # [B, V] float32
    groups_ref,  # [B, NUM_GROUPS] int32
    edge_ref,  # and the following: [B]; no logit outside the groups is larger
    temperature_ref,
    top_k_ref,
    top_p_ref,
    min_p_slack_ref,
    reach_ref,
    key0_ref,
    key1_ref,
    ids_ref,
    *,
    size: int,
) -> None:
    row = pl.program_id(0)
    edge, temperature, top_k, top_p = (ref[row] for ref in (edge_ref, temperature_ref, top_k_ref, top_p_ref))
    key0, key1 = key0_ref[row], key1_ref[row]
    entry = jnp.arange(_CANDIDATES, dtype=jnp.int32)
    ids = pltriton.load(groups_ref.at[row, entry // GROUP]) * GROUP + entry % GROUP
    values = pltriton.load(x_ref.at[row, ids], mask=ids < size, other=-jnp.inf)
    best = values.max()
    is_greedy = temperature == 0
    inverse = 1 / jnp.where(is_greedy, 1.0, temperature)

    def weigh(x: jax.Array) -> jax.Array:
        return jnp.where(x > -jnp.inf, jnp.exp((x - best) * inverse), 0.0)

    def ones(x: jax.Array) -> jax.Array:
        return jnp.ones_like(x)

    def scores(x: jax.Array, token_ids: jax.Array, threshold: jax.Array) -> jax.Array:
        return jnp.where(x >= threshold, x + temperature * noise_of(key0, key1, token_ids), -jnp.inf)

    def is_inside(threshold: jax.Array) -> jax.Array:
        """Whether all that is at or above it, and may be drawn, is here."""
        return (threshold > edge) | (edge == -jnp.inf)

    def narrow_sums(weight: Callable[[jax.Array], jax.Array]) -> Sums:
        weights = weight(values)
        return lambda thresholds: [jnp.where(values >= t, weights, 0.0).sum() for t in thresholds]

    def wide_sums(weight: Callable[[jax.Array], jax.Array]) -> Sums:
        return partial(_sums_of_row, x_ref, row, size, weight)

    def find(
        is_wanted: jax.Array, weight: Callable[[jax.Array], jax.Array], target: jax.Array, low: jax.Array
    ) -> jax.Array:
        """The largest t, at or above `low`, with a weight of `target` at or above it; `low` if not wanted."""

        def look_wider(found: jax.Array) -> jax.Array:
            return lax.cond(
                is_inside(found),
                lambda: found,
                lambda: _search(wide_sums(weight), target, low, edge, _WIDE_BITS),
            )

        def look() -> jax.Array:
            return look_wider(_search(narrow_sums(weight), target, low, best, _NARROW_BITS))

        return lax.cond(is_wanted, look, lambda: low)

    floor = jnp.where(is_greedy, best, best + min_p_slack_ref[row])
    floor = find((top_k < size) & ~is_greedy, ones, top_k.astype(jnp.float32), floor)
    wants_top_p = (top_p < 1) & ~is_greedy
    total = lax.cond(
        is_inside(floor) | ~wants_top_p,
        lambda: narrow_sums(weigh)([floor])[0],
        lambda: wide_sums(weigh)([floor])[0],
    )
    low = jnp.where(wants_top_p, jnp.maximum(floor, best + reach_ref[row]), floor)
    threshold = find(wants_top_p, weigh, top_p * total, low)

    def draw_narrow() -> jax.Array:
        score = scores(values, ids, threshold)
        return jnp.where(score == score.max(), ids, size - 1).min()

    def draw_wide() -> jax.Array:
        return _best_of_row(x_ref, row, size, lambda x, token_ids: scores(x, token_ids, threshold))

    ids_ref[row] = lax.cond(is_inside(threshold) | is_greedy, draw_narrow, draw_wide)


def _search(sums: Sums, target: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    """vocab_search.find_threshold for one row, `bits` a pass from the first in which low and high differ."""
    first, last = image_of(low), image_of(high)
    span = jnp.where(last > first, last - first, jnp.uint32(0))

    def as_uint(number: jax.Array) -> jax.Array:
        return number.astype(jnp.uint32)

    def narrow(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, shift = carry
        tried = [found + (jnp.uint32(digit) << as_uint(shift)) for digit in range(1, 2**bits)]
        digit = jnp.uint32(0)
        for t, total in zip(tried, sums([value_of(t) for t in tried]), strict=True):
            digit += as_uint((t >= found) & (t <= last) & (total >= target))
        return found + (digit << as_uint(shift)), shift - bits

    shift = lax.while_loop(
        lambda shift: (shift > 0) & ((span >> as_uint(shift)) == 0),
        lambda shift: shift - bits,
        jnp.int32(32 - bits),
    )
    return value_of(lax.while_loop(lambda carry: carry[1] >= 0, narrow, (first, shift))[0])


def _sums_of_row(
    x_ref,
    row: jax.Array,
    size: int,
    weight: Callable[[jax.Array], jax.Array],
    thresholds: Sequence[jax.Array],
) -> list[jax.Array]:
    """For each threshold, the weight of the row's logits at or above it; one pass."""

    def add(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        tiles = [_tile(x_ref, row, size, index * _UNROLLED + i)[0] for i in range(_UNROLLED)]
        for x in tiles:
            weights = weight(x)
            sums = tuple(
                total + jnp.where(x >= t, weights, 0.0) for total, t in zip(sums, thresholds, strict=True)
            )
        return sums

    zeros = (jnp.zeros(_TILE, jnp.float32),) * len(thresholds)
    return [total.sum() for total in lax.fori_loop(0, pl.cdiv(size, _TILE * _UNROLLED), add, zeros)]


def _best_of_row(
    x_ref, row: jax.Array, size: int, scores: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Index of the largest score of the row's logits, the lowest among equals."""

    def compare(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best, winners = carry  # [_TILE], of the columns of every tile so far
        for x, token_ids in [_tile(x_ref, row, size, index * _UNROLLED + i) for i in range(_UNROLLED)]:
            score = scores(x, token_ids)
            winners = jnp.where(score > best, token_ids, winners)
            best = jnp.maximum(best, score)
        return best, winners

    nothing = jnp.full(_TILE, -jnp.inf, jnp.float32), jnp.full(_TILE, size - 1, jnp.int32)
    best, winners = lax.fori_loop(0, pl.cdiv(size, _TILE * _UNROLLED), compare, nothing)
    return jnp.where(best == best.max(), winners, size - 1).min()


def _tile(x_ref, row: jax.Array, size: int, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [_TILE] of a row, -inf beyond its end, and their token ids."""
    token_ids = index * _TILE + jnp.arange(_TILE, dtype=jnp.int32)
    return pltriton.load(x_ref.at[row, token_ids], mask=token_ids < size, other=-jnp.inf), token_ids
