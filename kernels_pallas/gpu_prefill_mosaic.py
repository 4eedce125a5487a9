"""Attention of long chunks over paged keys and values on Hopper GPUs, written in Pallas for Mosaic GPU.

A persistent kernel after FlashAttention 3 (arXiv:2407.08608): one warpgroup fetches pages into shared memory by TMA,
two compute 64 queries each of two heads that share these keys, and take turns so that one multiplies while the other
computes its softmax.  Tiles are exactly 64 tokens of one row, the last of a row being moved back over the one before
it (both write the same values there).  Rows with fewer tokens than that are left to the Triton kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.kernels_pallas import gpu_prefill
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.scoring import Scoring

TILE = 64  # queries of a warpgroup, the rows of one wgmma
_COLUMNS = 64  # 16-bit values in a row of swizzled shared memory
_COMPUTE_WARPGROUPS = 2
_LOG2_E = math.log2(math.e)
_MASKED = -(2.0**100)  # as in gpu_prefill: finite, and exact when scaled


@dataclass(frozen=True, slots=True)
class MosaicConfig:
    """How the kernel cuts its work."""

    block_keys: int = 128
    num_stages: int = 2  # blocks of keys, and of values, in shared memory
    num_programs: int = 132  # an H100's multiprocessors: each holds one program


def default_config(head_dim: int) -> MosaicConfig:
    """A configuration that fits an H100's shared memory and registers."""
    return MosaicConfig(num_stages=2 if head_dim > 64 else 3)


def supports(q: jax.Array, kv_pages: jax.Array) -> bool:
    """Whether `attend` has a kernel for queries [T, N, H] and pages [P, S, K, 2, H] of these shapes and types."""
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _, _ = kv_pages.shape
    block = default_config(head_dim).block_keys
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and kv_pages.dtype == q.dtype
        and head_dim in (64, 128)
        and num_heads // num_kv_heads % _COMPUTE_WARPGROUPS == 0
        and page_size % 8 == 0
        and (block % page_size == 0 or page_size % block == 0)
        and num_tokens >= TILE
    )


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
    *,
    config: MosaicConfig | None = None,
) -> jax.Array:
    """gpu_prefill.attend for what `supports` accepts.

    What lies in the pages behind a row's last key must be finite: it is multiplied by zero.
    """
    out = attend_long_rows(q, kv_pages, meta, scoring, config=config)
    return gpu_prefill.attend(q, kv_pages, meta, scoring, out=out, shorter_than=TILE)


# Jitted, so that a model's layers share one tracing and lowering, which takes half a second.
@partial(jax.jit, static_argnames=("scoring", "config", "interpret"))
def attend_long_rows(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
    *,
    config: MosaicConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`attend` for rows of at least TILE new tokens; what it returns for other tokens means nothing."""
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _, _ = kv_pages.shape
    config = config or default_config(head_dim)
    block, stages = config.block_keys, config.num_stages
    copies = max(1, block // page_size)  # of a block's keys, a page or a part of one each
    halves = head_dim // _COLUMNS
    tiles, num_tiles = plan_tiles(meta, num_tokens)
    kernel = partial(
        _kernel,
        group=num_heads // num_kv_heads,
        num_pairs=num_heads // _COMPUTE_WARPGROUPS,
        page_size=page_size,
        config=config,
        scoring=scoring,
        interpret=interpret is not None,
    )
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (plgpu.TilingTransform((8, _COLUMNS)), swizzle)
    q_shape = (_COMPUTE_WARPGROUPS, 2, halves, TILE, _COLUMNS)
    # Two views of one memory.  A column half of a tile is written by TMA from any token on only if its rows are
    # not tiled by 8, while wgmma and stores want tiles; for 64 columns both orders are the same.
    q_smem: Any = plgpu.SMEM(q_shape, q.dtype)
    if interpret is None:
        q_smem = plgpu.RefUnion(
            plgpu.SMEM(q_shape, q.dtype, transforms=(swizzle,)),
            plgpu.SMEM(q_shape, q.dtype, transforms=tiled),
        )
    kv_smem = plgpu.SMEM((stages, block, head_dim), q.dtype, transforms=tiled)
    filled = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    consumed = plgpu.Barrier(num_arrivals=_COMPUTE_WARPGROUPS, num_barriers=stages)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads * head_dim), q.dtype),
        scratch_types=[
            q_smem,
            kv_smem,
            kv_smem,
            plgpu.Barrier(num_arrivals=halves, num_barriers=2 * _COMPUTE_WARPGROUPS),
            filled,
            filled,
            consumed,
            consumed,
            plgpu.Barrier(num_arrivals=_COMPUTE_WARPGROUPS),
        ],
        grid=(config.num_programs,),
        grid_names=("program",),
        num_threads=_COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="prefill_attention_mosaic",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(
        tiles,
        num_tiles,
        meta.page_table,
        q.reshape(num_tokens, num_heads * head_dim),
        kv_pages.reshape(num_pages * page_size, num_kv_heads * 2 * head_dim),
    )
    return out.reshape(q.shape)


def plan_tiles(meta: AttentionMetadata, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Tiles of TILE tokens that cover every row with that many, most keys first, and their number.

    Returns [3, NT] int32 (first token of the tile within the step, its position, its row) and [1] int32.  A function
    of `meta` alone: XLA computes it once a step, whatever the number of layers.
    """
    lengths = meta.query_starts[1:] - meta.query_starts[:-1]
    counts = jnp.where(lengths >= TILE, (lengths + TILE - 1) // TILE, 0)
    ends = jnp.cumsum(counts)
    full = num_tokens // TILE
    index = jnp.arange(full + min(full, lengths.shape[0]), dtype=jnp.int32)
    row = jnp.sum(index[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, lengths.shape[0] - 1)
    row_end = meta.query_starts[row + 1]
    start = meta.query_starts[row] + (index - (ends - counts)[row]) * TILE
    start = jnp.minimum(start, row_end - TILE)
    position = meta.kv_lens[row] - (row_end - start)
    order = jnp.argsort(jnp.where(index < ends[-1], -position, 1))
    return jnp.stack([start, position, row])[:, order].astype(jnp.int32), ends[-1:].astype(jnp.int32)


def _kernel(
    tiles_ref,
    num_tiles_ref,
    table_ref,
    q_ref,
    kv_ref,
    out_ref,
    q_smem,
    k_smem,
    v_smem,
    q_filled,
    k_filled,
    v_filled,
    k_consumed,
    v_consumed,
    turns,
    *,
    group: int,
    num_pairs: int,
    page_size: int,
    config: MosaicConfig,
    scoring: Scoring,
    interpret: bool,
) -> None:
    """One program: its share of the items, an item being a tile of tokens and a pair of heads."""
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    block, stages, num_programs = config.block_keys, config.num_stages, config.num_programs
    head_dim = k_smem.shape[-1]
    num_items = num_tiles_ref[0] * num_pairs

    def item_of(turn: jax.Array) -> jax.Array:
        # To and fro, so that who gets the longest item of one turn gets the shortest of the next.
        return turn * num_programs + jnp.where(turn % 2 == 0, program, num_programs - 1 - program)

    full_turns = num_items // num_programs
    num_turns = full_turns + (item_of(full_turns) < num_items).astype(jnp.int32)

    def item_at(turn: jax.Array) -> tuple[jax.Array, ...]:
        """First token, its position, row and pair of heads of this program's item; any beyond its last."""
        tile = jnp.minimum(item_of(turn) // num_pairs, tiles_ref.shape[1] - 1)
        return tiles_ref[0, tile], tiles_ref[1, tile], tiles_ref[2, tile], item_of(turn) % num_pairs

    def blocks_of(position: jax.Array) -> tuple[jax.Array, ...]:
        """Bounds of three runs of blocks: seen by some of the tile's queries, by all, by some."""
        window = scoring.window
        last = (position + TILE + block - 1) // block
        diagonal = (position + 1) // block
        first = whole = jnp.int32(0)
        if window is not None:
            first = jnp.maximum(position - window + 1, 0) // block
            whole = jnp.minimum((jnp.maximum(position + TILE - window, 0) + block - 1) // block, last)
            diagonal = jnp.maximum(diagonal, whole)
        return first, whole, diagonal, last

    @pl.when(warpgroup == _COMPUTE_WARPGROUPS)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")

        def fetch_item(turn, step):
            _, position, row, pair = item_at(turn)
            column = (pair * _COMPUTE_WARPGROUPS // group) * (2 * head_dim)
            first, _, _, last = blocks_of(position)

            def fetch_block(index, step):
                slot = lax.rem(step, jnp.int32(stages))
                rows = _page_rows(table_ref, row, index, block, page_size)
                count = min(block, page_size)
                for offset, smem, filled, consumed in (
                    (0, k_smem, k_filled, k_consumed),
                    (head_dim, v_smem, v_filled, v_consumed),
                ):
                    pl.when(step >= stages)(lambda consumed=consumed: plgpu.barrier_wait(consumed.at[slot]))
                    columns = pl.ds(pl.multiple_of(column + offset, _COLUMNS), head_dim)
                    for i, start in enumerate(rows):
                        plgpu.copy_gmem_to_smem(
                            kv_ref.at[pl.ds(start, count), columns],
                            smem.at[slot, pl.ds(i * count, count)],
                            filled.at[slot],
                        )
                return step + 1

            return lax.fori_loop(first, last, fetch_block, step)

        num_steps = lax.fori_loop(0, num_turns, fetch_item, jnp.int32(0))
        for before_end in range(stages, 0, -1):  # every phase of a barrier is waited for

            @pl.when(num_steps >= before_end)
            def _drain(step=num_steps - before_end):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(k_consumed.at[slot])
                plgpu.barrier_wait(v_consumed.at[slot])

    @pl.when(warpgroup < _COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        if interpret:
            q_flat = q_tiled = q_smem
        else:
            q_flat, q_tiled = q_smem

        def fetch_queries(turn: jax.Array, item: tuple[jax.Array, ...]) -> None:
            start, _, _, pair = item
            buffer = turn % 2
            column = (pair * _COMPUTE_WARPGROUPS + warpgroup) * head_dim
            for half in range(head_dim // _COLUMNS):
                plgpu.copy_gmem_to_smem(
                    q_ref.at[pl.ds(start, TILE), pl.ds(column + half * _COLUMNS, _COLUMNS)],
                    q_flat.at[warpgroup, buffer, half],
                    q_filled.at[warpgroup * 2 + buffer],
                )

        def take_turns() -> None:
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(turns)

        first_item = item_at(jnp.int32(0))
        pl.when(num_turns > 0)(lambda: fetch_queries(jnp.int32(0), first_item))
        pl.when(warpgroup == 1)(take_turns)

        def compute_item(turn, carry):
            step, start, position, _, pair = carry
            buffer = turn % 2
            first, whole, diagonal, last = blocks_of(position)
            attend_block = partial(
                _attend_block,
                q_tiled.at[warpgroup, buffer],
                k_smem,
                v_smem,
                (k_filled, v_filled, k_consumed, v_consumed, turns),
                first_step=step - first,
                last_index=last - 1,
                position=position,
                scoring=scoring,
                interpret=interpret,
            )
            carry = _init_carry(head_dim, interpret)
            plgpu.barrier_wait(q_filled.at[warpgroup * 2 + buffer])
            plgpu.barrier_wait(k_filled.at[lax.rem(step, jnp.int32(stages))])
            if scoring.window is not None:
                carry = lax.fori_loop(first, whole, partial(attend_block, masked=True), carry)
            carry = lax.fori_loop(whole, diagonal, partial(attend_block, masked=False), carry)
            # By now the last item's output has left the other buffer, and what is ahead hides how long loads take.
            next_item = item_at(turn + 1)

            @pl.when(turn + 1 < num_turns)
            def _next_queries():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch_queries(turn + 1, next_item)

            acc, _, total = lax.fori_loop(diagonal, last, partial(attend_block, masked=True), carry)
            out = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
            out = out.astype(out_ref.dtype)
            column = (pair * _COMPUTE_WARPGROUPS + warpgroup) * head_dim
            for half in range(head_dim // _COLUMNS):
                columns = slice(half * _COLUMNS, (half + 1) * _COLUMNS)
                q_tiled[warpgroup, buffer, half] = out[:, columns]
            plgpu.commit_smem()
            for half in range(head_dim // _COLUMNS):
                plgpu.copy_smem_to_gmem(
                    q_flat.at[warpgroup, buffer, half],
                    out_ref.at[pl.ds(start, TILE), pl.ds(column + half * _COLUMNS, _COLUMNS)],
                )
            return step + (last - first), *next_item

        lax.fori_loop(0, num_turns, compute_item, (jnp.int32(0), *first_item))
        pl.when(warpgroup == 0)(take_turns)
        plgpu.wait_smem_to_gmem(0)


def _page_rows(
    table_ref: Any, row: jax.Array, index: jax.Array, block: int, page_size: int
) -> list[jax.Array]:
    """First rows, in the pages seen as one matrix of tokens, of the copies that make up a block of keys."""
    if page_size >= block:
        blocks = page_size // block
        start = table_ref[row, index // blocks] * page_size + index % blocks * block
        return [pl.multiple_of(start, 8)]
    pages = block // page_size
    # The last block may run over the end of the table; those keys are masked.
    columns = [jnp.minimum(index * pages + i, table_ref.shape[1] - 1) for i in range(pages)]
    return [pl.multiple_of(table_ref[row, column] * page_size, 8) for column in columns]


def _init_carry(head_dim: int, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, largest score in base 2 and sum of weights before any key."""
    cast = plgpu.layout_cast if not interpret else lambda x, _: x
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    return (
        cast(jnp.zeros((TILE, head_dim), jnp.float32), plgpu.Layout.WGMMA),
        cast(jnp.full((TILE,), _MASKED, jnp.float32), row_layout),
        cast(jnp.zeros((TILE,), jnp.float32), row_layout),
    )


def _attend_block(
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    barriers: tuple[Any, ...],
    index: jax.Array,
    carry: tuple[Any, Any, Any],
    *,
    first_step: jax.Array,
    last_index: jax.Array,
    position: jax.Array,
    scoring: Scoring,
    interpret: bool,
    masked: bool,
) -> tuple[Any, Any, Any]:
    """One block of keys and values for one warpgroup; its keys have arrived, and so have the next when it returns."""
    k_filled, v_filled, k_consumed, v_consumed, turns = barriers
    stages, block, _ = k_smem.shape
    acc, largest, total = carry
    step = first_step + index
    slot = lax.rem(step, jnp.int32(stages))

    def take_turns() -> None:
        plgpu.barrier_arrive(turns)
        plgpu.barrier_wait(turns)

    halves = [pl.ds(half * _COLUMNS, _COLUMNS) for half in range(q_smem.shape[0])]
    if interpret:  # which knows neither transposed operands nor accumulators that begin with a value
        scores = jnp.zeros((TILE, block), jnp.float32)
        for half, columns in enumerate(halves):
            scores += jnp.dot(q_smem[half], k_smem[slot, :, columns].T, preferred_element_type=jnp.float32)
        take_turns()
    else:

        def multiply_keys(scores_ref):
            for half, columns in enumerate(halves):
                plgpu.wgmma(scores_ref, q_smem.at[half], k_smem.at[slot, :, columns].transpose((1, 0)))
            take_turns()
            return scores_ref[...]

        scores = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((TILE, block), jnp.float32))
    plgpu.barrier_arrive(k_consumed.at[slot])

    if scoring.soft_cap is None:
        to_log2 = scoring.scale * _LOG2_E
    else:
        doubled = scores * (2.0 * _LOG2_E * scoring.scale / scoring.soft_cap)
        scores = 1.0 - 2.0 / (1.0 + jnp.exp2(doubled))  # tanh
        to_log2 = scoring.soft_cap * _LOG2_E
    if masked:
        iota = partial(lax.broadcasted_iota, jnp.int32, (TILE, block))
        if not interpret:
            iota = partial(plgpu.broadcasted_iota, jnp.int32, (TILE, block), layout=plgpu.Layout.WGMMA)
        behind = iota(0) + (position - index * block) - iota(1)  # how far the key lies behind the query
        visible = behind >= 0
        if scoring.window is not None:
            visible &= behind < scoring.window
        scores = jnp.where(visible, scores, _MASKED)
    new_largest = jnp.maximum(largest, scores.max(axis=1) * to_log2)
    rescale = jnp.exp2(largest - new_largest)
    weights = jnp.exp2(scores * to_log2 - lax.broadcast_in_dim(new_largest, scores.shape, [0]))
    acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
    total = total * rescale
    narrow = weights.astype(v_smem.dtype)
    total = total + weights.sum(axis=1)
    # All of the softmax before the other warpgroup's turn.
    acc, total, new_largest, narrow = lax.optimization_barrier((acc, total, new_largest, narrow))
    plgpu.barrier_arrive(turns)
    plgpu.barrier_wait(v_filled.at[slot])
    plgpu.barrier_wait(turns)

    def wait_for_next_keys() -> None:
        next_slot = lax.rem(step + 1, jnp.int32(stages))
        pl.when(index < last_index)(lambda: plgpu.barrier_wait(k_filled.at[next_slot]))

    if interpret:
        acc = acc + jnp.dot(narrow, v_smem[slot], preferred_element_type=jnp.float32)
        wait_for_next_keys()
    else:

        def multiply_values(acc_ref):
            plgpu.wgmma(acc_ref, narrow, v_smem.at[slot])
            wait_for_next_keys()

        acc = pl.run_state(multiply_values)(plgpu.WGMMAAccumulatorRef.init(acc))
    plgpu.barrier_arrive(v_consumed.at[slot])
    return acc, new_largest, total
