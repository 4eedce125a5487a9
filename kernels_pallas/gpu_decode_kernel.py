"""The body of the GPU decode kernel; gpu_decode.py says what it computes and launches it.

Written for Triton's rules, as Pallas has them: every array's size is a power of two, and a masked access is indexed
by arrays and scalars alone, without slices.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.kernels_pallas.tuning import DecodeTuning

MIN_TILE = 16  # rows and depth of the smallest matrix product that the tensor cores take
_MASKED = -1e30  # finite: the difference of two masked scores must not be NaN
_TINY = 1e-30
_LOG2E = math.log2(math.e)
_COMBINED_ELEMENTS = 4096  # of the splits' sums, held in registers at a time


class DecodeArrays(NamedTuple):
    """The kernel's inputs; inside the kernel, references to them."""

    kv_pages: Any  # [P, S, K, 2, H]
    counters: Any  # [R, K] int32, None where no row is split
    q: Any  # [R, K, G or more, H]
    k: Any  # [R, K, 1 or more, H]
    v: Any  # [R, K, 1 or more, H]
    page_table: Any  # [R, MP] int32
    kv_lens: Any  # [R] int32
    cos: Any = None  # [R, H/2]
    sin: Any = None  # [R, H/2]
    q_norm: Any = None  # [H]
    k_norm: Any = None  # [H]
    kv_scales: Any = None  # [K, 2]


@dataclass(frozen=True)
class DecodeSpec:
    """What the kernel knows at trace time."""

    group: int  # G
    head_dim: int
    page_size: int
    k_slot: int  # where the key stands on axis 2 of `k`
    v_slot: int
    dtype: jnp.dtype  # of q, k and v
    page_dtype: jnp.dtype
    scale: float
    window: int | None
    soft_cap: float | None
    eps: float
    tuning: DecodeTuning
    interpret: bool

    @property
    def tile(self) -> int:
        """Query rows of a matrix product; those past the group repeat its last head, and are never stored."""
        return max(MIN_TILE, pl.next_power_of_2(self.group))

    @property
    def parts(self) -> list[tuple[int, int]]:
        """head_dim as (start, size) of powers of two: 80 is 64 and 16."""
        parts, start = [], 0
        while start < self.head_dim:
            size = 1 << ((self.head_dim - start).bit_length() - 1)
            parts.append((start, size))
            start += size
        return parts

    @property
    def dot_dtype(self) -> jnp.dtype:
        """Of the matrix products' operands."""
        return self.dtype if self.page_dtype.itemsize == 1 else jnp.promote_types(self.dtype, self.page_dtype)


_Parts = list[jax.Array]  # one array for each of DecodeSpec.parts, which follow each other on the last axis


def decode_kernel(refs: DecodeArrays, kv_pages: Any, *outputs: Any, spec: DecodeSpec) -> None:
    """One program.  outputs: the counters and scratch of split rows, if any are split, and the output."""
    *scratch, out = outputs
    head, split, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length = refs.kv_lens[row]
    num_cached = jnp.maximum(length - 1, 0)  # tokens that come from the pages; the last one never does
    first = jnp.int32(0) if spec.window is None else jnp.maximum(length - spec.window, 0)
    first_block = first // spec.tuning.block_kv
    num_blocks = pl.cdiv(num_cached, spec.tuning.block_kv) - first_block
    block_share = max(1, spec.tuning.split_tokens // spec.tuning.block_kv)
    num_splits = jnp.clip(pl.cdiv(num_blocks, block_share), 1, spec.tuning.num_splits)

    @pl.when(split < num_splits)
    def _work() -> None:
        key_scale, value_scale = _scales(refs, head)
        heads = jnp.minimum(jnp.arange(spec.tile), spec.group - 1)
        q = _new_heads(refs.q, refs.q_norm, refs, row, head, heads, spec)  # [tile, part]
        new_k = _new_heads(refs.k, refs.k_norm, refs, row, head, spec.k_slot, spec)  # [part]
        new_k = [_to_page(x, key_scale, spec) for x in new_k]
        new_v = [
            _to_page(
                refs.v[row, head, spec.v_slot, pl.ds(start, size)].astype(jnp.float32), value_scale, spec
            )
            for start, size in spec.parts
        ]

        has_new = (split == 0) & (length > 0)

        @pl.when(has_new)
        def _write() -> None:
            page = refs.page_table[row, num_cached // spec.page_size]
            offset = num_cached % spec.page_size
            for (start, size), k, v in zip(spec.parts, new_k, new_v, strict=True):
                kv_pages[page, offset, head, 0, pl.ds(start, size)] = k
                kv_pages[page, offset, head, 1, pl.ds(start, size)] = v

        def to_scores(products: jax.Array) -> jax.Array:
            """Scores in units of log 2, the softmax being computed by powers of two."""
            scores = products * (spec.scale * key_scale)
            if spec.soft_cap is not None:
                scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
            return scores * _LOG2E

        new_score = to_scores(
            _add(jnp.sum(_wide(a) * _wide(b)[None], axis=1) for a, b in zip(q, new_k, strict=True))
        )
        q = [x.astype(spec.dot_dtype) for x in q]

        def body(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            acc, largest, total = carry
            block = first_block + split + index * num_splits
            positions = block * spec.tuning.block_kv + jnp.arange(spec.tuning.block_kv)
            visible = positions < num_cached
            if spec.window is not None:
                visible &= positions >= first
            safe = jnp.minimum(positions, num_cached - 1)
            pages = refs.page_table[row, safe // spec.page_size]
            offsets = safe % spec.page_size

            def load(which: int, start: int, size: int) -> jax.Array:
                columns = start + jnp.arange(size)
                tile = kv_pages.at[pages[:, None], offsets[:, None], head, which, columns[None]]
                # Masked lanes cost no memory traffic, and read as zero.
                return pltriton.load(tile, mask=visible[:, None], other=0.0).astype(spec.dot_dtype)

            keys = [load(0, *part) for part in spec.parts]
            values = [load(1, *part) for part in spec.parts]
            scores = to_scores(_add(_dot(a, b, 1) for a, b in zip(q, keys, strict=True)))
            scores = jnp.where(visible[None], scores, _MASKED)
            new_largest = jnp.maximum(largest, scores.max(axis=1))
            rescale = jnp.exp2(largest - new_largest)
            weights = jnp.exp2(scores - new_largest[:, None])
            total = total * rescale + weights.sum(axis=1)
            weights = weights.astype(spec.dot_dtype)
            acc = [a * rescale[:, None] + _dot(weights, b, 0) for a, b in zip(acc, values, strict=True)]
            return acc, new_largest, total

        carry = (
            [jnp.where(has_new, jnp.broadcast_to(_wide(x), (spec.tile, x.size)), 0.0) for x in new_v],
            jnp.where(has_new, new_score, _MASKED),
            jnp.where(has_new, jnp.ones_like(new_score), 0.0),
        )
        trips = pl.cdiv(num_blocks - split, num_splits)
        acc, largest, total = lax.fori_loop(0, trips, body, carry)
        if not scratch:
            _store(out, row, head, acc, total, value_scale, spec)
            return

        @pl.when(num_splits == 1)
        def _whole() -> None:
            _store(out, row, head, acc, total, value_scale, spec)

        @pl.when(num_splits > 1)
        def _share() -> None:
            counters, sums, stats = scratch
            heads = jnp.arange(spec.tile)
            for (start, size), part in zip(spec.parts, acc, strict=True):
                tile = sums.at[row, head, split, heads[:, None], (start + jnp.arange(size))[None]]
                pltriton.store(tile, part, mask=jnp.broadcast_to(heads[:, None] < spec.group, part.shape))
            pltriton.store(stats.at[row, head, split, 0, heads], largest, mask=heads < spec.group)
            pltriton.store(stats.at[row, head, split, 1, heads], total, mask=heads < spec.group)
            if not spec.interpret:
                pltriton.debug_barrier()  # all threads have stored, before one of them counts the program
            finished = pltriton.atomic_add(counters, (row, head), jnp.int32(1))

            @pl.when(finished == num_splits - 1)
            def _last() -> None:
                counters[row, head] = jnp.int32(0)
                _combine(out, sums, stats, row, head, num_splits, value_scale, spec)


def _add(terms: Iterable[jax.Array]) -> jax.Array:
    return reduce(operator.add, terms)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _scales(refs: DecodeArrays, head: jax.Array) -> tuple[Any, Any]:
    if refs.kv_scales is None:
        return 1.0, 1.0
    return refs.kv_scales[head, 0], refs.kv_scales[head, 1]


def _new_heads(
    ref: Any, norm: Any, refs: DecodeArrays, row: jax.Array, head: jax.Array, slots: Any, spec: DecodeSpec
) -> _Parts:
    """The step's queries or key, normed and turned as asked, in the inputs' dtype.  `slots` is scalar or [tile]."""
    is_tile = not isinstance(slots, int)
    index = slots[:, None] if is_tile else slots
    half = spec.head_dim // 2

    def load(columns: jax.Array) -> jax.Array:
        return ref[row, head, index, columns[None] if is_tile else columns].astype(jnp.float32)

    own = [load(start + jnp.arange(size)) for start, size in spec.parts]
    inverse_rms: Any = None
    if norm is not None:
        mean_square = _add(jnp.sum(x * x, axis=-1, keepdims=is_tile) for x in own) / spec.head_dim
        inverse_rms = lax.rsqrt(mean_square + spec.eps)

    def normed(x: jax.Array, columns: jax.Array) -> jax.Array:
        if norm is None:
            return x
        # Rounded where the unfused computation rounds.
        return (x * inverse_rms * norm[columns].astype(jnp.float32)).astype(spec.dtype).astype(jnp.float32)

    heads = []
    for (start, size), x in zip(spec.parts, own, strict=True):
        columns = start + jnp.arange(size)
        x = normed(x, columns)
        if refs.cos is not None:
            is_first = columns < half
            angles = jnp.where(is_first, columns, columns - half)
            partners = jnp.where(is_first, columns + half, columns - half)
            sine = refs.sin[row, angles] * jnp.where(is_first, -1.0, 1.0)
            x = x * refs.cos[row, angles] + normed(load(partners), partners) * sine
        heads.append(x.astype(spec.dtype))
    return heads


def _to_page(x: jax.Array, scale: Any, spec: DecodeSpec) -> jax.Array:
    """As the page keeps it: divided by its scale, and for 8 bits cut off at the largest number there is."""
    x = x.astype(jnp.float32) / scale
    if spec.page_dtype.itemsize == 1:
        largest = float(jnp.finfo(spec.page_dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(spec.page_dtype)


def _dot(a: jax.Array, b: jax.Array, b_axis: int) -> jax.Array:
    """Contracts a's last axis with `b_axis` of b, accumulating in float32."""
    # By default float32 would be multiplied as tf32.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _store(
    out: Any,
    row: jax.Array,
    head: jax.Array,
    acc: Sequence[jax.Array],
    total: jax.Array,
    value_scale: Any,
    spec: DecodeSpec,
) -> None:
    """Write acc / total, [group, H] of the tile, to the row's heads.  A row without tokens has sums of zero."""
    rows = jnp.arange(total.size)
    factor = value_scale / jnp.maximum(total, _TINY)
    for (start, size), part in zip(spec.parts, acc, strict=True):
        tile = out.at[row, (head * spec.group + rows)[:, None], (start + jnp.arange(size))[None]]
        mask = jnp.broadcast_to(rows[:, None] < spec.group, part.shape)
        pltriton.store(tile, (part * factor[:, None]).astype(spec.dtype), mask=mask)


def _combine(
    out: Any,
    sums: Any,
    stats: Any,
    row: jax.Array,
    head: jax.Array,
    num_splits: jax.Array,
    value_scale: Any,
    spec: DecodeSpec,
) -> None:
    """Add up what the row's splits have left in scratch memory, and write the output."""
    rows = pl.next_power_of_2(spec.group)
    heads = jnp.arange(rows)

    def load(ref: Any, index: tuple[Any, ...], mask: jax.Array, other: float) -> jax.Array:
        # Past the first-level cache, which other multiprocessors' stores do not reach.
        return pltriton.load(ref.at[(row, head, *index)], mask=mask, other=other, volatile=True)

    def load_stats(splits: jax.Array) -> tuple[jax.Array, jax.Array]:
        alive = (splits < num_splits)[:, None] & (heads < spec.group)[None]
        index = splits[:, None], heads[None]
        largest = load(stats, (index[0], 0, index[1]), alive, _MASKED)
        return largest, load(stats, (index[0], 1, index[1]), alive, 0.0)

    largest, totals = load_stats(jnp.arange(spec.tuning.num_splits))
    top = largest.max(axis=0)
    total = jnp.sum(jnp.exp2(largest - top[None]) * totals, axis=0)
    # As many splits at a time as registers hold, all loads under way at once.
    chunk = max(1, min(spec.tuning.num_splits, _COMBINED_ELEMENTS // (rows * spec.parts[0][1])))

    def body(index: jax.Array, acc: list[jax.Array]) -> list[jax.Array]:
        splits = index * chunk + jnp.arange(chunk)
        weights = jnp.exp2(load_stats(splits)[0] - top[None])  # [chunk, rows]
        alive = ((splits < num_splits)[:, None] & (heads < spec.group)[None])[:, :, None]
        added = []
        for (start, size), part in zip(spec.parts, acc, strict=True):
            index3 = splits[:, None, None], heads[None, :, None], (start + jnp.arange(size))[None, None]
            shares = load(sums, index3, jnp.broadcast_to(alive, (chunk, rows, size)), 0.0)
            added.append(part + jnp.sum(weights[:, :, None] * shares, axis=0))
        return added

    acc = [jnp.zeros((rows, size), jnp.float32) for _, size in spec.parts]
    acc = lax.fori_loop(0, pl.cdiv(num_splits, chunk), body, acc)
    _store(out, row, head, acc, total, value_scale, spec)
