"""Attention of ragged chunks over paged keys and values on NVIDIA GPUs, written in Pallas for Triton.

One program computes one query tile of one row for one kv head, online softmax in base 2 (FlashAttention 2,
arXiv:2307.08691).  The query heads of the group are folded into the rows of the tile, so that a page is read once
for all of them, and a tile of a single token still fills a tensor core's smallest matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.powers_of_two import power_of_two_parts
from jaxserve.kernels_pallas.scoring import Scoring

# Finite: a block without any visible key gives weights that the next visible key scales to 0.  A power of two, so that
# scaling it is exact, and a fused multiply-add finds no difference between it and the largest score.
_MASKED = -(2.0**100)
_LOG2_E = math.log2(math.e)
_SMALL_ROWS = 16  # rows of the smallest matrix that a tensor core multiplies


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel cuts its work.  Block sizes are powers of two, at least 16."""

    block_rows: int  # rows (queries times heads of a group) that a program computes at once
    block_keys: int  # keys that it reads at a time
    num_warps: int
    num_stages: int  # blocks of keys and values under way at once


def default_config(head_dim: int, dtype: jax.typing.DTypeLike) -> PrefillConfig:
    """A configuration that fits an H100's shared memory and registers."""
    if jnp.dtype(dtype).itemsize > 2:  # multiplied without tensor cores, in true float32
        return PrefillConfig(block_rows=16, block_keys=32, num_warps=4, num_stages=2)
    if head_dim <= 64:
        return PrefillConfig(block_rows=128, block_keys=64, num_warps=4, num_stages=3)
    if head_dim <= 128:
        return PrefillConfig(block_rows=128, block_keys=64, num_warps=8, num_stages=3)
    # With 4 warps it neither fits into registers nor compiles within a minute.
    return PrefillConfig(block_rows=64, block_keys=64, num_warps=8, num_stages=2)


def tile_size(num_heads: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Tokens of a query tile that fills a program: what the planner had best put into `meta.tile_size`.

    Any other size is computed too: larger tiles are cut, smaller ones leave rows of the program idle.
    """
    return max(1, default_config(head_dim, dtype).block_rows // (num_heads // num_kv_heads))


# Jitted, so that a model's layers share one tracing and lowering.
@partial(jax.jit, static_argnames=("scoring", "shorter_than", "config", "interpret"))
def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
    *,
    out: jax.Array | None = None,
    shorter_than: int | None = None,
    config: PrefillConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of q [T, N, H] over pages that already hold this step's keys and values; [T, N, H].

    Pages may be of a narrower type than q (float8): they are widened to it.  float32 is multiplied as float32.
    Padding tokens give zeros.  With `shorter_than`, rows of as many new tokens or more are left alone: what `out`
    [T, N, H] holds for them is kept, and `out` is overwritten in place.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pages.shape[2]
    config = config or default_config(head_dim, q.dtype)
    group = num_heads // num_kv_heads
    # Rows that are short are tiles themselves, whatever tiles were planned.
    tile_size = meta.tile_size if shorter_than is None else shorter_than - 1
    num_tiles = (meta.tile_rows if shorter_than is None else meta.kv_lens).shape[0]
    tile = min(tile_size, max(1, config.block_rows // group))
    rows = max(_SMALL_ROWS, pl.next_power_of_2(tile * group))
    num_programs = num_tiles * pl.cdiv(tile_size, tile)
    kernel: Any = partial(
        _kernel,
        tile=tile,
        tile_size=tile_size,
        shorter_than=shorter_than,
        rows=rows,
        group=group,
        block=config.block_keys,
        page_size=kv_pages.shape[1],
        fill_steps=pl.cdiv(num_tokens, num_programs * tile),
        scoring=scoring,
    )
    args = [
        meta.tile_rows,
        meta.tile_starts,
        jnp.reshape(meta.num_tiles, (1,)),
        meta.query_starts,
        meta.kv_lens,
        meta.page_table,
        q,
        kv_pages,
    ]
    aliases = {}
    if out is not None:
        aliases = {len(args): 0}
        args.append(out)
    return pl.pallas_call(
        # The last ref is the output; an aliased input before it is the same memory.
        lambda *refs: kernel(*refs[:8], refs[-1]),
        grid=(num_kv_heads, num_programs),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        input_output_aliases=aliases,
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="prefill_attention" if out is None else "prefill_attention_short_rows",
    )(*args)


def _kernel(
    tile_rows_ref,
    tile_starts_ref,
    num_tiles_ref,
    query_starts_ref,
    kv_lens_ref,
    table_ref,
    q_ref,
    kv_ref,
    out_ref,
    *,
    tile: int,
    tile_size: int,
    shorter_than: int | None,
    rows: int,
    group: int,
    block: int,
    page_size: int,
    fill_steps: int,
    scoring: Scoring,
) -> None:
    """Program (kv head, part of a tile)."""
    head = pl.program_id(0)
    num_programs = pl.num_programs(1)
    # Backwards: a chunk's last tiles see the most keys, and what starts last should be short.
    index = num_programs - 1 - pl.program_id(1)
    tile_parts = -(-tile_size // tile)
    tile_index = index // tile_parts
    row = tile_rows_ref[tile_index] if shorter_than is None else tile_index
    tile_start = tile_starts_ref[tile_index] if shorter_than is None else query_starts_ref[row]
    start = tile_start + index % tile_parts * tile
    row_end = query_starts_ref[row + 1]
    count = jnp.minimum(jnp.minimum(row_end, tile_start + tile_size) - start, tile)
    if shorter_than is None:
        is_live = tile_index < num_tiles_ref[0]
    else:
        is_live = row_end - tile_start < shorter_than
    count = jnp.where(is_live, count, 0)
    kv_len = kv_lens_ref[row]

    def attend_rows(num_rows: int) -> None:
        _attend_rows(
            q_ref,
            kv_ref,
            out_ref,
            partial(_page_ids, table_ref, row, page_size),
            num_rows=num_rows,
            group=group,
            block=block,
            head=head,
            start=start,
            count=count,
            first_position=kv_len - (row_end - start),
            kv_len=kv_len,
            scoring=scoring,
        )

    if rows == _SMALL_ROWS:
        pl.when(count > 0)(lambda: attend_rows(rows))
    else:
        # Decodes and the ends of chunks: the smallest matrix will do.
        is_small = count * group <= _SMALL_ROWS
        pl.when((count > 0) & is_small)(lambda: attend_rows(_SMALL_ROWS))
        pl.when(~is_small)(lambda: attend_rows(rows))

    # What padding tokens return is written to pages in the next layer, and must be finite.
    num_tokens = q_ref.shape[0]
    num_live = query_starts_ref[query_starts_ref.shape[0] - 1]
    for step in range(fill_steps):
        first = num_live + (step * num_programs + index) * tile

        @pl.when(first < num_tokens)
        def _fill(first=first):
            tokens, heads, is_row = _rows_of_tile(rows, group, first, head, tile)
            is_row &= tokens < num_tokens
            for start, length in power_of_two_parts(q_ref.shape[2]):
                zeros = jnp.zeros((rows, length), out_ref.dtype)
                _store_rows(out_ref, tokens, heads, pl.Slice(start, length), zeros, is_row)


def _rows_of_tile(num_rows: int, group: int, start: Any, head: Any, count: Any) -> tuple[jax.Array, ...]:
    """Token and query head of each row of a tile, [M] each, and whether it is one of the tile's `count` tokens."""
    row = jnp.arange(num_rows, dtype=jnp.int32)
    return start + row // group, head * group + row % group, row // group < count


def _store_rows(
    out_ref: Any, tokens: jax.Array, heads: jax.Array, part: pl.Slice, values: jax.Array, mask: jax.Array
) -> None:
    columns = part.start + jnp.arange(part.size, dtype=jnp.int32)
    pltriton.store(
        out_ref.at[tokens[:, None], heads[:, None], columns[None, :]],
        values,
        mask=jnp.broadcast_to(mask[:, None], values.shape),
    )


def _page_ids(
    table_ref: Any, row: jax.Array, page_size: int, block: int, index: jax.Array
) -> tuple[Any, Any]:
    """Page and offset of a block's keys: one page and a slice where a page holds whole blocks, else one per key."""
    if page_size % block == 0:
        blocks = page_size // block
        return table_ref[row, index // blocks], pl.ds(index % blocks * block, block)
    keys = index * block + jnp.arange(block, dtype=jnp.int32)
    # The last block may run over the end of the table; those keys are masked.
    columns = jnp.minimum(keys // page_size, table_ref.shape[1] - 1)
    return table_ref[row, columns], keys % page_size


def _attend_rows(
    q_ref: Any,
    kv_ref: Any,
    out_ref: Any,
    page_ids: Callable[[int, jax.Array], tuple[Any, Any]],
    *,
    num_rows: int,
    group: int,
    block: int,
    head: jax.Array,
    start: jax.Array,
    count: jax.Array,
    first_position: jax.Array,
    kv_len: jax.Array,
    scoring: Scoring,
) -> None:
    """Online softmax of `num_rows` rows over the blocks that any of them sees."""
    dtype, window, soft_cap = q_ref.dtype, scoring.window, scoring.soft_cap
    parts = [pl.Slice(*part) for part in power_of_two_parts(q_ref.shape[2])]
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    tokens, heads, is_row = _rows_of_tile(num_rows, group, start, head, count)
    positions = first_position + jnp.arange(num_rows, dtype=jnp.int32) // group
    readable = jnp.minimum(tokens, q_ref.shape[0] - 1)
    queries = [q_ref[readable, heads, part] for part in parts]

    def body(index: jax.Array, carry: tuple[Any, ...], *, masked: bool) -> tuple[Any, ...]:
        accs, largest, total = carry
        pages, offsets = page_ids(block, index)
        scores = jnp.zeros((num_rows, block), jnp.float32)
        for query, part in zip(queries, parts, strict=True):
            keys = kv_ref[pages, offsets, head, 0, part].astype(dtype)
            scores += dot(query, keys.T)
        if soft_cap is None:
            to_log2 = scoring.scale * _LOG2_E
        else:
            scores = _tanh(scores * (scoring.scale / soft_cap))
            to_log2 = soft_cap * _LOG2_E
        key = index * block + jnp.arange(block, dtype=jnp.int32)
        if masked:
            visible = key[None, :] <= positions[:, None]
            if window is not None:
                visible &= key[None, :] > positions[:, None] - window
            scores = jnp.where(visible, scores, _MASKED)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1) * to_log2)
        rescale = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(scores * to_log2 - new_largest[:, None])
        total = total * rescale + jnp.sum(weights, axis=1)
        weights = weights.astype(dtype)
        new_accs = []
        for acc, part in zip(accs, parts, strict=True):
            values = kv_ref[pages, offsets, head, 1, part].astype(dtype)
            if masked:  # what lies behind the last key may be anything, and 0 times infinity is not 0
                values = jnp.where((key < kv_len)[:, None], values, jnp.zeros_like(values))
            new_accs.append(acc * rescale[:, None] + dot(weights, values))
        return tuple(new_accs), new_largest, total

    carry = (
        tuple(jnp.zeros((num_rows, part.size), jnp.float32) for part in parts),
        jnp.full((num_rows,), _MASKED, jnp.float32),
        jnp.zeros((num_rows,), jnp.float32),
    )
    # Blocks from `whole` to `diagonal` are seen by every row; those around them by some.
    end = first_position + count
    last = pl.cdiv(end, block)
    diagonal = (first_position + 1) // block
    whole = jnp.int32(0)
    if window is not None:
        first = jnp.maximum(first_position - window + 1, 0) // block
        whole = jnp.minimum(pl.cdiv(jnp.maximum(end - window, 0), block), last)
        diagonal = jnp.maximum(diagonal, whole)
        carry = lax.fori_loop(first, whole, partial(body, masked=True), carry)
    carry = lax.fori_loop(whole, diagonal, partial(body, masked=False), carry)
    accs, _, total = lax.fori_loop(diagonal, last, partial(body, masked=True), carry)
    for acc, part in zip(accs, parts, strict=True):
        _store_rows(out_ref, tokens, heads, part, (acc / total[:, None]).astype(out_ref.dtype), is_row)


def _tanh(x: jax.Array) -> jax.Array:
    """tanh by exp2: accurate to float32's rounding of 1, which a soft cap only scales."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * _LOG2_E)))
