"""Searches over vocabulary-wide rows: argmax, top-k, and the exact value threshold of a top-k or top-p set.

All of it is exact and nothing sorts the vocabulary.  XLA's own argmax and top_k are slow on its CPU backend
(variadic reductions are not vectorised), and top_k is a full sort on GPUs: so both go through group maxima.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GROUP = 64  # values whose maximum stands for them in the first stage of argmax and top_k
_DIGIT_BITS = 4  # resolved by one straight-line pass of find_threshold: 15 sums that XLA fuses into one read


def argmax(x: jax.Array, *, on_cpu: bool) -> jax.Array:
    """Index of the largest value of each row [B, V], the lowest among equals; int32 [B]."""
    if not on_cpu or x.shape[1] <= GROUP:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    groups = _grouped(x)
    best = jnp.argmax(groups.max(-1), axis=-1)  # [B]
    members = jnp.take_along_axis(groups, best[:, None, None], axis=1)[:, 0]  # [B, GROUP]
    return (best * GROUP + jnp.argmax(members, axis=-1)).astype(jnp.int32)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values of each row [B, V], largest first, and their indices int32: exactly lax.top_k.

    Equal values come in index order there, and so they do here: k groups with the largest maxima (lowest
    index first among equals) hold the k elements that come first, and putting the groups back in order keeps
    the tie rule.
    """
    batch, size = x.shape
    if k == 0:
        return jnp.zeros((batch, 0), x.dtype), jnp.zeros((batch, 0), jnp.int32)
    if size < 2 * k * GROUP:
        return _lax_top_k(x, k)
    groups = _grouped(x)
    chosen = jnp.sort(_lax_top_k(groups.max(-1), k)[1], axis=-1)  # [B, k]
    members = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(batch, -1)
    values, index = _lax_top_k(members, k)
    ids = jnp.take_along_axis(chosen, index // GROUP, axis=1) * GROUP + index % GROUP
    return values, jnp.minimum(ids, size - 1)  # a padding index can only stand for -inf


def candidates(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array | None]:
    """Values of x [B, V] among which are each row's k largest, [B, k * GROUP], and their indices int32.

    They are the k groups of GROUP neighbours with the largest maxima, the first among equals, in no order:
    whatever is larger than the k-th largest value is there, and the first of the largest.  Where V is no
    larger than that, x itself, and None for the indices.  An index past V stands beside a value of -inf.
    """
    batch, size = x.shape
    if size <= k * GROUP:
        return x, None
    chosen, _ = largest_groups(x, k)
    ids = (chosen[:, :, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)).reshape(batch, -1)
    values = jnp.take_along_axis(x, jnp.minimum(ids, size - 1), axis=1)
    # Kept apart from what reads them, which would otherwise gather them again in each of its passes.
    return lax.optimization_barrier((jnp.where(ids < size, values, -jnp.inf), ids))


def largest_groups(x: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """Which groups of GROUP neighbours have the `num` largest maxima of each row [B, V], and the least of these.

    The groups [B, num] int32 come largest first, and of equals the first come.  No value outside them is
    larger than the second result, float32 [B].
    """
    maxima = _grouped(x).max(-1)
    maxima = jnp.where(maxima == 0, 0.0, maxima)  # which top_k would not take for -0.0's equal
    values, chosen = _lax_top_k(maxima, num)
    return chosen, values[:, -1]


def find_threshold(
    x: jax.Array, weights: jax.Array | None, target: jax.Array, low: jax.Array, *, on_cpu: bool
) -> jax.Array:
    """The largest t [B], at or above `low`, such that entries x [B, V] with x >= t weigh `target` or more.

    weights [B, V] (None: 1 each) are not negative.  `low` itself where no larger t will do.  The answer is
    found digit by digit in the order-preserving uint32 image of float32, so it is exact after a fixed number
    of passes; sums of one row always run in one order, which makes them monotone in t. On CPUs one bit a
    pass, and a row is done once its sum hits the target: t may then be smaller, but splits x alike.
    Elsewhere straight-line code, 4 bits a pass, since a branch would break the CUDA graph.
    """
    high = image_of(x.max(-1))

    def digit_passes(start: jax.Array, shift: jax.Array | int, bits: int) -> tuple[jax.Array, jax.Array]:
        steps = jnp.arange(1, 2**bits, dtype=jnp.uint32) << shift  # [n]
        tried = start[:, None] + steps  # [B, n]
        in_range = (tried >= start[:, None]) & (tried <= high[:, None])
        is_above = x[:, None, :] >= value_of(tried)[:, :, None]  # [B, n, V]
        weight = 1.0 if weights is None else weights[:, None, :]
        sums = jnp.where(is_above, weight, 0.0).sum(-1)
        passes = in_range & (sums >= target[:, None])
        return passes, sums

    start = image_of(low)
    if on_cpu:

        def narrow(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            shift, found, is_done = carry
            passes, sums = digit_passes(found, shift, 1)
            found = jnp.where(passes[:, 0] & ~is_done, found + (jnp.uint32(1) << shift), found)
            return shift - 1, found, is_done | (passes[:, 0] & (sums[:, 0] == target))

        def is_open(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            return (carry[0] < 32) & ~carry[2].all()  # the shift wraps round below 0

        span = jnp.where(high > start, high - start, 0).max()
        is_done = jnp.zeros(x.shape[0], bool)
        start = lax.while_loop(is_open, narrow, (31 - lax.clz(span), start, is_done))[1]
    else:
        for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
            passes, _ = digit_passes(start, shift, _DIGIT_BITS)
            start = start + (passes.sum(-1, dtype=jnp.uint32) << shift)
    return value_of(start)


def _lax_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """lax.top_k, kept apart from what reads it: XLA turns a top_k whose result is sliced into a full sort.

    One by one: in programs for several devices a barrier of both would be top_k's only reader, which XLA dies of (jax
    0.10.2, CPU).
    """
    values, ids = lax.top_k(x, k)
    return lax.optimization_barrier(values), lax.optimization_barrier(ids)


def _grouped(x: jax.Array) -> jax.Array:
    """[B, V] as [B, ceil(V / GROUP), GROUP], filled up with -inf."""
    padding = -x.shape[1] % GROUP
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return x.reshape(x.shape[0], -1, GROUP)


def image_of(x: jax.Array) -> jax.Array:
    """float32 as uint32 in the same order (-0.0 just below 0.0)."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 != 0, ~bits, bits | np.uint32(0x80000000))


def value_of(image: jax.Array) -> jax.Array:
    """The float32 that image_of maps to this; 0 for subnormals, which XLA's CPU code compares as 0 anyway."""
    bits = jnp.where(image >> 31 != 0, image & np.uint32(0x7FFFFFFF), ~image)
    is_subnormal = (bits & np.uint32(0x7F800000)) == 0
    return lax.bitcast_convert_type(jnp.where(is_subnormal, 0, bits), jnp.float32)
