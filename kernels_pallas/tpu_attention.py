"""Attention over paged keys and values on TPUs, for decodes and ragged chunks alike, written in Pallas.

A grid step computes one query tile of one row for all heads: online softmax over blocks of pages, which it fetches
itself.  While it computes one block the next is under way, be it the first of the next tile.  The query heads of a
group are rows of one matrix, so that a block is read once for all of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.scoring import Scoring


class _Tiles(NamedTuple):
    """The query tiles of a step, and where each token's result is found.  A function of the step alone."""

    rows: jax.Array  # [NT] int32, of the page table
    positions: jax.Array  # [NT] int32, of a tile's first token
    ends: jax.Array  # [NT] int32, keys that any of its tokens sees; 0 for a tile that is not used
    tokens: jax.Array  # [NT, tile] int32; behind the row's last, any
    of_token: jax.Array  # [T] int32, a token's tile
    offsets: jax.Array  # [T] int32, and its place there
    is_live: jax.Array  # [T] bool, false for padding


LANES = 128  # of a vector register, and the one head_dim that `_head_of_block` can read
_ROWS = 16  # sublanes of a register of 16-bit numbers
_BLOCK_TOKENS = 512  # at most, of keys and values fetched at a time
_BUFFER_BYTES = 4 * 2**20  # of the two blocks in vector memory
_WRITTEN_TOKENS = 64  # whose copies into pages are under way at once
_MASKED = -1e30  # finite: the difference of two masked scores must not be NaN
_HIGH_HALF = 0xFFFF0000


def supports(q: jax.Array, kv_pages: jax.Array) -> bool:
    """Whether there are kernels for queries [T, N, H] and pages [P, S, K, 2, H] of these shapes and types."""
    return q.dtype == kv_pages.dtype == jnp.bfloat16 and q.shape[-1] == LANES


@partial(jax.jit, static_argnames="interpret")
def write_kv(
    kv_pages: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata, *, interpret: bool = False
) -> jax.Array:
    """xla.write_kv, in place when the pages are donated: XLA's scatter of many rows copies all pages before and after.

    Compiled for v5e (jax 0.11.2, 2026-11-25): 2048 tokens into 1 GiB of pages took 1 GiB of scratch there.
    """
    page_size = kv_pages.shape[1]
    pages = meta.page_table[meta.token_rows, meta.positions // page_size]
    kv = jnp.stack([k, v], axis=2)
    num_tokens = kv.shape[0]
    count = min(_WRITTEN_TOKENS, num_tokens)
    return pl.pallas_call(
        partial(_write_rows, num_tokens=num_tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(num_tokens, count),),
            in_specs=[
                pl.BlockSpec((count, *kv.shape[1:]), lambda i, *_: (i, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_kv_tpu",
    )(pages, meta.positions % page_size, kv, kv_pages)


def _write_rows(
    pages_ref: Any, offsets_ref: Any, kv_ref: Any, _: Any, out_ref: Any, written: Any, *, num_tokens: int
) -> None:
    """A block of tokens."""
    first = pl.program_id(0) * kv_ref.shape[0]
    count = jnp.minimum(num_tokens - first, kv_ref.shape[0])

    def each(do: Any) -> None:
        @pl.loop(0, count)
        def _token(i: Any) -> None:
            place = out_ref.at[pages_ref[first + i], offsets_ref[first + i]]
            do(pltpu.make_async_copy(kv_ref.at[i], place, written))

    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())


# Jitted, so that a model's layers share one tracing and lowering.
@partial(jax.jit, static_argnames=("scoring", "block_tokens", "interpret"))
def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
    *,
    block_tokens: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of q [T, N, H] over pages that already hold this step's keys and values; [T, N, H].

    Padding tokens give zeros.  `block_tokens` is a multiple of the page size.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _, _ = kv_pages.shape
    group = num_heads // num_kv_heads
    token_bytes = num_kv_heads * 2 * head_dim * kv_pages.dtype.itemsize
    if block_tokens is None:
        fitting = min(_BLOCK_TOKENS, _BUFFER_BYTES // (2 * token_bytes))
        block_tokens = max(page_size, fitting // page_size * page_size)
    tiles = _tiles(meta, num_tokens)
    num_tiles, tile = tiles.tokens.shape
    queries = q[tiles.tokens].reshape(num_tiles, tile, num_kv_heads, group, head_dim)
    queries = queries.swapaxes(1, 2).reshape(num_tiles, num_kv_heads, tile * group, head_dim)
    rows = -(-tile * group // _ROWS) * _ROWS
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - tile * group), (0, 0)))
    table = meta.page_table[:, None]  # a row is then a whole block of its own

    def same(index: Any, *_: Any) -> tuple[Any, ...]:
        return index, 0, 0, 0

    def row_of(index: Any, rows: Any) -> tuple[Any, ...]:
        return rows[jnp.minimum(index, num_tiles - 1)], 0, 0

    table_block = (None, 1, table.shape[2])
    out = pl.pallas_call(
        partial(_kernel, group=group, block_tokens=block_tokens, scoring=scoring),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_tiles,),
            in_specs=[
                pl.BlockSpec(table_block, lambda i, rows, *_: row_of(i, rows), memory_space=pltpu.SMEM),
                pl.BlockSpec(table_block, lambda i, rows, *_: row_of(i + 1, rows), memory_space=pltpu.SMEM),
                pl.BlockSpec((None, num_kv_heads, rows, head_dim), same),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((None, num_kv_heads, rows, head_dim), same),
            scratch_shapes=[
                pltpu.VMEM((2, block_tokens // page_size, *kv_pages.shape[1:]), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((num_kv_heads, rows, head_dim), jnp.float32),
                pltpu.VMEM((num_kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((num_kv_heads, rows, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="paged_attention_tpu",
    )(tiles.rows, tiles.positions, tiles.ends, table, table, queries, kv_pages)
    out = out[:, :, : tile * group].reshape(num_tiles, num_kv_heads, tile, group, head_dim)
    return jnp.where(tiles.is_live[:, None, None], out[tiles.of_token, :, tiles.offsets].reshape(q.shape), 0)


def _tiles(meta: AttentionMetadata, num_tokens: int) -> _Tiles:
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    if meta.kind == "decode":
        zeros = jnp.zeros_like(tokens)
        ends = meta.kv_lens
        return _Tiles(tokens, ends - 1, ends, tokens[:, None], tokens, zeros, ends > 0)
    rows, tile = meta.tile_rows, meta.tile_size
    is_used = jnp.arange(rows.shape[0]) < meta.num_tiles
    starts = jnp.where(is_used, meta.tile_starts, num_tokens)
    positions = meta.kv_lens[rows] - (meta.query_starts[rows + 1] - starts)
    ends = jnp.where(is_used, jnp.minimum(positions + tile, meta.kv_lens[rows]), 0)
    of_token = jnp.searchsorted(starts, tokens, side="right").astype(jnp.int32) - 1
    offsets = jnp.minimum(tokens - starts[of_token], tile - 1)
    read = jnp.minimum(starts[:, None] + jnp.arange(tile), num_tokens - 1)
    return _Tiles(rows, positions, ends, read, of_token, offsets, tokens < meta.query_starts[-1])


def _kernel(
    rows_ref: Any,  # [NT] in scalar memory, as the next two
    positions_ref: Any,
    ends_ref: Any,
    table_ref: Any,  # [1, MP] in scalar memory: this tile's row of the page table
    next_table_ref: Any,  # and the next tile's
    q_ref: Any,  # [K, M, H]
    pages_ref: Any,  # [P, S, K, 2, H], where they lie
    out_ref: Any,  # [K, M, H]
    buffer: Any,  # [2, pages of a block, S, K, 2, H]
    arrived: Any,  # semaphores [2]
    step_ref: Any,  # [1], blocks that were computed before this tile
    acc_ref: Any,  # [K, M, H] float32
    largest_ref: Any,  # [K, M, LANES] float32, the same in all lanes
    total_ref: Any,  # [K, M, LANES] float32, the same in all lanes
    *,
    group: int,
    block_tokens: int,
    scoring: Scoring,
) -> None:
    """One tile."""
    del rows_ref  # index maps alone read it
    index, last_tile = pl.program_id(0), pl.num_programs(0) - 1
    page_size = pages_ref.shape[1]
    block_pages = block_tokens // page_size

    def blocks_of(tile: Any) -> tuple[Any, Any]:
        """The first block that a tile sees, and the one behind its last; the same for a tile that is not used."""
        end = pl.cdiv(ends_ref[tile], block_tokens)
        if scoring.window is None:
            return jnp.minimum(0, end), end
        return jnp.minimum(jnp.maximum(positions_ref[tile] - scoring.window + 1, 0) // block_tokens, end), end

    def each_page(tile: Any, block: Any, step: Any, table: Any, do: Any) -> None:
        """`do` with the copy of every page of a block that holds keys of the tile."""
        slot = lax.rem(step, 2)
        first = block * block_pages
        count = jnp.minimum(pl.cdiv(ends_ref[tile], page_size) - first, block_pages)

        @pl.loop(0, count)
        def _page(i: Any) -> None:
            source = pages_ref.at[table[0, first + i]]
            do(pltpu.make_async_copy(source, buffer.at[slot, i], arrived.at[slot]))

    def start(tile: Any, block: Any, step: Any, table: Any) -> None:
        each_page(tile, block, step, table, lambda copy: copy.start())

    @pl.when(index == 0)
    def _begin() -> None:
        step_ref[0] = 0

    first, end = blocks_of(index)
    before = jnp.maximum(index - 1, 0)
    first_before, end_before = blocks_of(before)
    was_fetched = (index > 0) & (first_before < end_before)
    first_step = step_ref[0]
    pl.when((first < end) & ~was_fetched)(lambda: start(index, first, first_step, table_ref))
    following = jnp.minimum(index + 1, last_tile)
    first_after, end_after = blocks_of(following)
    has_following = (index < last_tile) & (first_after < end_after)

    acc_ref[...] = jnp.zeros_like(acc_ref)
    largest_ref[...] = jnp.full_like(largest_ref, _MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)

    @pl.loop(first, end)
    def _block(block: Any) -> None:
        step = first_step + block - first
        pl.when(block + 1 < end)(lambda: start(index, block + 1, step + 1, table_ref))
        pl.when((block + 1 == end) & has_following)(
            lambda: start(following, first_after, step + 1, next_table_ref)
        )
        each_page(index, block, step, table_ref, lambda copy: copy.wait())
        slot = lax.rem(step, 2)
        for head in range(q_ref.shape[0]):
            _attend_block(
                q_ref[head],
                *_head_of_block(buffer.at[slot], head),
                (acc_ref.at[head], largest_ref.at[head], total_ref.at[head]),
                first_key=block * block_tokens,
                end_key=ends_ref[index],
                position=positions_ref[index],
                group=group,
                scoring=scoring,
            )

    step_ref[0] = first_step + end - first
    out_ref[...] = (acc_ref[...] / jnp.maximum(total_ref[...], 1e-30)).astype(out_ref.dtype)


def _head_of_block(block_ref: Any, head: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [block tokens, H] of a kv head, from [pages, S, K, 2, H] bfloat16.

    A key and its value are the two halves of words that lie side by side, a head's `K` rows apart: one strided load
    brings both.
    """
    pages, page_size, num_kv_heads, _, head_dim = block_ref.shape
    words = block_ref.bitcast(jnp.uint32).reshape(pages * page_size * num_kv_heads, head_dim)
    own = words[head::num_kv_heads, :]
    halves = own << 16, own & jnp.uint32(_HIGH_HALF)
    keys, values = (pltpu.bitcast(half, jnp.float32).astype(jnp.bfloat16) for half in halves)
    return keys, values


def _attend_block(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    carry: tuple[Any, Any, Any],
    *,
    first_key: Any,
    end_key: Any,
    position: Any,
    group: int,
    scoring: Scoring,
) -> None:
    """Add a block to a head's output, largest score and sum of weights."""
    acc_ref, largest_ref, total_ref = carry
    scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    scores *= scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
    key = first_key + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    own = position + lax.broadcasted_iota(jnp.int32, scores.shape, 0) // group
    visible = (key <= own) & (key < end_key)
    if scoring.window is not None:
        visible &= key > own - scoring.window
    scores = jnp.where(visible, scores, _MASKED)
    largest = largest_ref[:, :1]
    new_largest = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
    rescale = jnp.exp(largest - new_largest)
    weights = jnp.where(visible, jnp.exp(scores - new_largest), 0.0)
    # What was not fetched may be anything, and 0 times infinity is not 0.
    fetched = first_key + lax.broadcasted_iota(jnp.int32, values.shape, 0) < end_key
    values = jnp.where(fetched, values, jnp.zeros_like(values))
    added = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    acc_ref[...] = acc_ref[...] * rescale + added
    total = total_ref[:, :1] * rescale + jnp.sum(weights, axis=1, keepdims=True)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
    largest_ref[...] = jnp.broadcast_to(new_largest, largest_ref.shape)
