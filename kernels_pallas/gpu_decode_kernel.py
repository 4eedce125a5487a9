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

from jaxserve.kernels_pallas.pages import to_page
from jaxserve.kernels_pallas.powers_of_two import power_of_two_parts
from jaxserve.kernels_pallas.scoring import Scoring
from jaxserve.kernels_pallas.tuning import DecodeTuning

MIN_TILE = 16  # rows and depth of the smallest matrix product that the tensor cores take
_MASKED = -1e30  # finite: the difference of two masked scores must not be NaN
_TINY = 1e-30
_LOG2_E = math.log2(math.e)
_COMBINED_PER_WARP = 4096  # elements of the splits' sums that are held in registers at a time


class DecodeArrays(NamedTuple):
    """The kernel's inputs; inside the kernel, references to them."""

    kv_pages: Any  # [P, S, K, 2, H]
    counters: Any  # [R, K] int32
    qkv: Any  # [R, K, G + 2, H]
    page_table: Any  # [R, MP] int32
    kv_lens: Any  # [R] int32
    cos: Any  # [R, H/2]
    sin: Any  # [R, H/2]
    q_norm: Any = None  # [H]
    k_norm: Any = None  # [H]


@dataclass(frozen=True)
class DecodeSpec:
    """What the kernel knows at trace time."""

    group: int  # G
    head_dim: int
    page_size: int
    dtype: jnp.dtype  # of qkv, and of the matrix products' operands
    scoring: Scoring
    eps: float
    tuning: DecodeTuning
    interpret: bool

    @property
    def tile(self) -> int:
        """Query rows of a matrix product; those past the group repeat its last head, and are never stored."""
        return max(MIN_TILE, pl.next_power_of_2(self.group))

    @property
    def parts(self) -> list[tuple[int, int]]:
        """head_dim as (start, size) of arrays that there can be."""
        return power_of_two_parts(self.head_dim)


_Parts = list[jax.Array]  # one array for each of DecodeSpec.parts, which follow each other on the last axis


def decode_kernel(refs: DecodeArrays, kv_pages: Any, *outputs: Any, spec: DecodeSpec) -> None:
    """One program.  outputs: the counters, the output, and what splits share if rows are split."""
    counters, out, *shares = outputs
    tuning, scoring = spec.tuning, spec.scoring
    head, split, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    # All that a program needs to begin is asked for at once, before anything depends on an answer.
    length = refs.kv_lens[row]
    num_cached = jnp.maximum(length - 1, 0)  # tokens that come from the pages; the last one never does
    first = jnp.int32(0) if scoring.window is None else jnp.maximum(length - scoring.window, 0)
    first_block = 0 if scoring.window is None else first // tuning.block_kv
    first_pages = _pages_of_block(refs, row, first_block + split, spec)[0]
    slots = jnp.minimum(jnp.arange(spec.tile), spec.group - 1)
    raw_q = _load_heads(refs.qkv, slots, row, head, spec, rope=True)  # [tile, part]
    raw_k = _load_heads(refs.qkv, spec.group, row, head, spec, rope=True)  # [part]
    raw_v = _load_heads(refs.qkv, spec.group + 1, row, head, spec, rope=False)
    q = _prepare(raw_q, refs.q_norm, refs, row, spec)

    num_blocks = pl.cdiv(num_cached, tuning.block_kv) - first_block
    block_share = max(1, tuning.split_tokens // tuning.block_kv)
    num_splits = jnp.clip(pl.cdiv(num_blocks, block_share), 1, tuning.num_splits)
    soft_cap = scoring.soft_cap
    score_factor = scoring.scale * (_LOG2_E if soft_cap is None else 1.0 / soft_cap)

    def to_scores(products: jax.Array) -> jax.Array:
        """Scores in units of log 2, the softmax being computed by powers of two."""
        if soft_cap is None:
            return products * score_factor
        return jnp.tanh(products * score_factor) * (soft_cap * _LOG2_E)

    def body(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        pages, acc, largest, total = carry
        block = first_block + split + index * num_splits
        _, offsets = _pages_of_block(None, row, block, spec)
        # One turn ahead, or the pipeline would spend a stage on waiting for it.
        next_pages, _ = _pages_of_block(refs, row, block + num_splits, spec)
        positions = block * tuning.block_kv + jnp.arange(tuning.block_kv)
        visible = positions < num_cached
        if scoring.window is not None:
            visible &= positions >= first

        def load(which: int, start: int, size: int) -> jax.Array:
            where = (pages if pages.ndim == 0 else pages[:, None]), offsets[:, None]
            tile = kv_pages.at[(*where, head, which, _columns((start, size))[None])]
            # Masked lanes cost no memory traffic, and read as zero.
            return pltriton.load(tile, mask=visible[:, None], other=0.0).astype(spec.dtype)

        keys = [load(0, *part) for part in spec.parts]
        values = [load(1, *part) for part in spec.parts]
        scores = to_scores(_add(_dot(a, b, 1) for a, b in zip(q, keys, strict=True)))
        scores = jnp.where(visible[None], scores, _MASKED)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        rescale = _exp2(largest - new_largest, spec)
        weights = _exp2(scores - new_largest[:, None], spec)
        total = total * rescale + weights.sum(axis=1)
        weights = weights.astype(spec.dtype)
        acc = [a * rescale[:, None] + _dot(weights, b, 0) for a, b in zip(acc, values, strict=True)]
        return next_pages, acc, new_largest, total

    @pl.when(split < num_splits)
    def _work() -> None:
        carry = (
            first_pages,
            [jnp.zeros((spec.tile, size), jnp.float32) for _, size in spec.parts],
            jnp.full((spec.tile,), _MASKED),
            jnp.zeros((spec.tile,), jnp.float32),
        )
        trips = pl.cdiv(num_blocks - split, num_splits)
        _, acc, largest, total = lax.fori_loop(0, trips, body, carry)

        has_new = (split == 0) & (length > 0)
        k = [to_page(x, kv_pages.dtype) for x in _prepare(raw_k, refs.k_norm, refs, row, spec)]
        v = [to_page(x, kv_pages.dtype) for x in raw_v.own]
        # What the page keeps is what counts, rounding included.
        products = _add(jnp.sum(_wide(a) * _wide(b)[None], axis=1) for a, b in zip(q, k, strict=True))
        new_largest = jnp.maximum(largest, jnp.where(has_new, to_scores(products), _MASKED))
        rescale = _exp2(largest - new_largest, spec)
        weight = jnp.where(has_new, _exp2(to_scores(products) - new_largest, spec), 0.0)
        acc = [a * rescale[:, None] + weight[:, None] * _wide(x)[None] for a, x in zip(acc, v, strict=True)]
        total = total * rescale + weight

        if not shares:
            _store(out, row, head, acc, total, spec)
        else:

            @pl.when(num_splits == 1)
            def _whole() -> None:
                _store(out, row, head, acc, total, spec)

            @pl.when(num_splits > 1)
            def _share() -> None:
                _leave(shares, row, head, split, acc, new_largest, total, spec)
                if not spec.interpret:
                    pltriton.debug_barrier()  # all threads have stored, before one of them counts the program
                finished = pltriton.atomic_add(counters, (row, head), jnp.int32(1))

                @pl.when(finished == num_splits - 1)
                def _last() -> None:
                    counters[row, head] = jnp.int32(0)
                    _combine(out, shares, row, head, num_splits, spec)

        # Last, since it waits for its page's number.
        @pl.when(has_new)
        def _write() -> None:
            page = refs.page_table[row, num_cached // spec.page_size]
            offset = num_cached % spec.page_size
            for part, x, y in zip(spec.parts, k, v, strict=True):
                kv_pages[page, offset, head, 0, pl.ds(*part)] = x
                kv_pages[page, offset, head, 1, pl.ds(*part)] = y


def _pages_of_block(
    refs: DecodeArrays | None, row: jax.Array, block: Any, spec: DecodeSpec
) -> tuple[Any, Any]:
    """Pages (if `refs` is given) and offsets in them of a block's tokens; one page where it holds the block.

    Blocks past the end of the row give pages that are not the row's: mask what is read there.
    """
    block_kv, page_size = spec.tuning.block_kv, spec.page_size
    token = jnp.arange(block_kv)
    if page_size % block_kv == 0:
        per_page = page_size // block_kv
        index, offsets = block // per_page, block % per_page * block_kv + token
    elif block_kv % page_size == 0:
        # The division is of constants: nothing of it is left in the loop.
        index, offsets = block * (block_kv // page_size) + token // page_size, token % page_size
    else:
        index, offsets = (block * block_kv + token) // page_size, (block * block_kv + token) % page_size
    if refs is None:
        return None, offsets
    return refs.page_table[row, jnp.minimum(index, refs.page_table.shape[1] - 1)], offsets


def _exp2(x: jax.Array, spec: DecodeSpec) -> jax.Array:
    if spec.interpret:
        return jnp.exp2(x)
    # Without the three instructions by which the library keeps subnormal results.
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    [result] = pltriton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape]
    )
    return result


def _add(terms: Iterable[jax.Array]) -> jax.Array:
    return reduce(operator.add, terms)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


class _RawHeads(NamedTuple):
    """Queries or a key as they lie in memory, each part twice where rope pairs its components with others."""

    own: _Parts
    partners: _Parts  # empty for values, which do not turn


def _columns(part: tuple[int, int]) -> jax.Array:
    start, size = part
    return start + jnp.arange(size)


def _partners(columns: jax.Array, spec: DecodeSpec) -> jax.Array:
    """The component that each one turns together with."""
    half = spec.head_dim // 2
    return jnp.where(columns < half, columns + half, columns - half)


def _load_heads(
    ref: Any, slots: Any, row: jax.Array, head: jax.Array, spec: DecodeSpec, *, rope: bool
) -> _RawHeads:
    """Heads `slots` of the row: an index, which gives arrays [part], or [tile], which gives [tile, part]."""

    def load(columns: jax.Array) -> jax.Array:
        if isinstance(slots, int):
            return ref[row, head, slots, columns]
        return ref[row, head, slots[:, None], columns[None]]

    columns = [_columns(part) for part in spec.parts]
    return _RawHeads([load(x) for x in columns], [load(_partners(x, spec)) for x in columns] if rope else [])


def _prepare(heads: _RawHeads, norm: Any, refs: DecodeArrays, row: jax.Array, spec: DecodeSpec) -> _Parts:
    """Normed if asked, turned, and rounded where the unfused computation rounds."""
    inverse_rms: Any = None
    if norm is not None:
        squares = _add(jnp.sum(_wide(x) * _wide(x), axis=-1) for x in heads.own)
        inverse_rms = lax.rsqrt(squares / spec.head_dim + spec.eps)
        if heads.own[0].ndim == 2:
            inverse_rms = inverse_rms[:, None]

    def normed(x: jax.Array, columns: jax.Array) -> jax.Array:
        if norm is None:
            return _wide(x)
        return _wide((_wide(x) * inverse_rms * _wide(norm[columns])).astype(spec.dtype))

    half = spec.head_dim // 2
    prepared = []
    for index, part in enumerate(spec.parts):
        columns = _columns(part)
        x = normed(heads.own[index], columns)
        angles = jnp.where(columns < half, columns, columns - half)
        sine = refs.sin[row, angles] * jnp.where(columns < half, -1.0, 1.0)
        partner = normed(heads.partners[index], _partners(columns, spec))
        prepared.append((x * refs.cos[row, angles] + partner * sine).astype(spec.dtype))
    return prepared


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
    spec: DecodeSpec,
) -> None:
    """Write acc / total, [group, H] of the tile, to the row's heads.  A row without tokens has sums of zero."""
    rows = jnp.arange(total.size)
    factor = 1.0 / jnp.maximum(total, _TINY)
    for (start, size), part in zip(spec.parts, acc, strict=True):
        tile = out.at[row, (head * spec.group + rows)[:, None], _columns((start, size))[None]]
        mask = jnp.broadcast_to(rows[:, None] < spec.group, part.shape)
        pltriton.store(tile, (part * factor[:, None]).astype(spec.dtype), mask=mask)


def _leave(
    shares: Sequence[Any],
    row: jax.Array,
    head: jax.Array,
    split: jax.Array,
    acc: Sequence[jax.Array],
    largest: jax.Array,
    total: jax.Array,
    spec: DecodeSpec,
) -> None:
    """Write a split's sums to scratch memory."""
    sums, stats = shares
    rows = jnp.arange(spec.tile)
    for part, x in zip(spec.parts, acc, strict=True):
        tile = sums.at[row, head, split, rows[:, None], _columns(part)[None]]
        pltriton.store(tile, x, mask=jnp.broadcast_to(rows[:, None] < spec.group, x.shape))
    pltriton.store(stats.at[row, head, split, 0, rows], largest, mask=rows < spec.group)
    pltriton.store(stats.at[row, head, split, 1, rows], total, mask=rows < spec.group)


def _combine(
    out: Any,
    shares: Sequence[Any],
    row: jax.Array,
    head: jax.Array,
    num_splits: jax.Array,
    spec: DecodeSpec,
) -> None:
    """Add up what the row's splits have left in scratch memory, and write the output."""
    sums, stats = shares
    num_heads = pl.next_power_of_2(spec.group)
    heads = jnp.arange(num_heads)
    # As many splits at a time as registers hold, with all loads under way at once.
    held = _COMBINED_PER_WARP * spec.tuning.num_warps // (num_heads * pl.next_power_of_2(spec.head_dim))
    chunk = max(1, min(spec.tuning.num_splits, held))

    def load(ref: Any, index: tuple[Any, ...], mask: jax.Array, other: float) -> jax.Array:
        # Volatile: past the first-level cache, which other multiprocessors' stores do not reach.
        return pltriton.load(ref.at[(row, head, *index)], mask=mask, other=other, volatile=True)

    def body(index: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        acc, largest, total = carry
        splits = index * chunk + jnp.arange(chunk)
        where = splits[:, None], heads[None]
        alive = (where[0] < num_splits) & (where[1] < spec.group)
        tops = load(stats, (where[0], 0, where[1]), alive, _MASKED)  # [chunk, heads]
        totals = load(stats, (where[0], 1, where[1]), alive, 0.0)
        added = []
        for part in spec.parts:
            where3 = splits[:, None, None], heads[None, :, None], _columns(part)[None, None]
            mask = jnp.broadcast_to(alive[:, :, None], (chunk, num_heads, part[1]))
            added.append(load(sums, where3, mask, 0.0))
        new_largest = jnp.maximum(largest, tops.max(axis=0))
        rescale = _exp2(largest - new_largest, spec)
        weights = _exp2(tops - new_largest[None], spec)
        acc = [
            a * rescale[:, None] + jnp.sum(weights[:, :, None] * b, axis=0)
            for a, b in zip(acc, added, strict=True)
        ]
        return acc, new_largest, total * rescale + jnp.sum(weights * totals, axis=0)

    carry = (
        [jnp.zeros((num_heads, size), jnp.float32) for _, size in spec.parts],
        jnp.full((num_heads,), _MASKED),
        jnp.zeros((num_heads,), jnp.float32),
    )
    if chunk == spec.tuning.num_splits:
        carry = body(0, carry)
    else:
        carry = lax.fori_loop(0, pl.cdiv(num_splits, chunk), body, carry)
    _store(out, row, head, carry[0], carry[2], spec)
