"""Paged attention in plain XLA: for CPUs, and for any platform that has no kernel of its own.

Work is proportional to the pages in use: loops run over blocks of pages up to the longest sequence of the step (a
trip count known only at run time), so one compiled program serves every context length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.pages import to_page
from jaxserve.kernels_pallas.scoring import Scoring

_MASKED = -1e30  # finite, so that a row without any visible key gives zeros and not NaN
_NO_KEY = 2**30  # length given to padding rows where the shortest length is looked for
_DECODE_BLOCK = 64  # context tokens that a loop iteration reads per sequence
_DECODE_GROUP = 8  # sequences that share a loop
_PREFILL_BLOCK = 256


def write_kv(kv_pages: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata) -> jax.Array:
    """Scatter k and v [T, K, H] into kv_pages [P, S, K, 2, H]; in place when the pages are donated."""
    page_size = kv_pages.shape[1]
    pages = meta.page_table[meta.token_rows, meta.positions // page_size]
    kv = to_page(jnp.stack([k, v], axis=2), kv_pages.dtype)  # [T, K, 2, H]
    return kv_pages.at[pages, meta.positions % page_size].set(kv)


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
) -> jax.Array:
    """Attention of q [T, N, H] over pages that already hold this step's keys and values; [T, N, H]."""
    if meta.kind == "decode":
        return _attend_decode(q, kv_pages, meta, scoring)
    return _attend_tiles(q, kv_pages, meta, scoring)


def _attend_decode(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
) -> jax.Array:
    """One query a row.  Rows go in groups, so that one long sequence makes only its own group loop long."""
    num_rows = q.shape[0]
    group = min(_DECODE_GROUP, num_rows)
    num_groups = -(-num_rows // group)
    spare = num_groups * group - num_rows
    q = jnp.pad(q, ((0, spare), (0, 0), (0, 0)))
    kv_lens = jnp.pad(meta.kv_lens, (0, spare))
    page_table = jnp.pad(meta.page_table, ((0, spare), (0, 0)))

    def attend_group(start: jax.Array | int) -> jax.Array:
        lens = lax.dynamic_slice_in_dim(kv_lens, start, group)
        shortest = jnp.min(jnp.where(lens > 0, lens, _NO_KEY))
        return _attend_blocks(
            lax.dynamic_slice_in_dim(q, start, group)[:, None],
            kv_pages,
            lax.dynamic_slice_in_dim(page_table, start, group),
            positions=(lens - 1)[:, None],
            first_key=jnp.int32(0) if scoring.window is None else shortest - scoring.window,
            num_keys=jnp.max(lens),
            block=_DECODE_BLOCK,
            scoring=scoring,
        )[:, 0]

    if num_groups == 1:
        return attend_group(0)

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(out, attend_group(index * group), index * group, axis=0)

    return lax.fori_loop(0, num_groups, body, jnp.zeros_like(q))[:num_rows]


def _attend_tiles(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
) -> jax.Array:
    """Ragged chunks: one query tile of one row after the other, in token order.

    A tile always computes `tile_size` queries.  Those past the end of its row are wrong, and are overwritten by the
    next tile, which begins there; behind the last tile lies padding.
    """
    num_tokens, num_heads, head_dim = q.shape
    tile = meta.tile_size
    q = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))
    positions = jnp.pad(meta.positions, (0, tile))

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        row, start = meta.tile_rows[index], meta.tile_starts[index]
        tile_positions = lax.dynamic_slice(positions, (start,), (tile,))
        first = tile_positions[0]
        result = _attend_blocks(
            lax.dynamic_slice(q, (start, 0, 0), (tile, num_heads, head_dim))[None],
            kv_pages,
            lax.dynamic_slice(meta.page_table, (row, 0), (1, meta.page_table.shape[1])),
            positions=(first + jnp.arange(tile))[None],
            first_key=jnp.int32(0) if scoring.window is None else first - scoring.window + 1,
            num_keys=jnp.minimum(first + tile, meta.kv_lens[row]),
            block=_PREFILL_BLOCK,
            scoring=scoring,
        )
        return lax.dynamic_update_slice(out, result[0], (start, 0, 0))

    out = lax.fori_loop(0, meta.num_tiles, body, jnp.zeros_like(q))
    return out[:num_tokens]


def _attend_blocks(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    *,
    positions: jax.Array,
    first_key: jax.Array,
    num_keys: jax.Array,
    block: int,
    scoring: Scoring,
) -> jax.Array:
    """Online softmax over blocks of pages.  q [B, C, N, H] at `positions` [B, C]; page_table [B, MP].

    No query sees keys from `num_keys` on, or before `first_key`.
    """
    num_rows, chunk, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_pages.shape[1:3]
    group = num_heads // num_kv_heads
    block_pages = max(1, min(block // page_size, page_table.shape[1]))
    block = block_pages * page_size
    # Room for the last block to run over the end of the table; those keys are masked.
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))
    queries = q.reshape(num_rows, chunk, num_kv_heads, group, head_dim).astype(jnp.float32) * scoring.scale

    def body(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, largest, total = carry
        pages = lax.dynamic_slice(page_table, (0, index * block_pages), (num_rows, block_pages))
        kv = kv_pages[pages].reshape(num_rows, block, num_kv_heads, 2, head_dim).astype(jnp.float32)
        scores = jnp.einsum("bckgh,bskh->bkgcs", queries, kv[:, :, :, 0], precision=lax.Precision.HIGHEST)
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
        keys = index * block + jnp.arange(block)
        visible = keys <= positions[:, :, None]  # [B, C, S]
        if scoring.window is not None:
            visible &= keys > positions[:, :, None] - scoring.window
        visible = visible[:, None, None]
        # What nobody sees may be anything, and 0 times infinity is not 0.
        is_key = (keys < num_keys) & (keys <= positions[:, -1:])  # [B, S]
        cached = jnp.where(is_key[:, :, None, None], kv[:, :, :, 1], 0.0)
        scores = jnp.where(visible, scores, _MASKED)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        rescale = jnp.exp(largest - new_largest)
        weights = jnp.where(visible, jnp.exp(scores - new_largest[..., None]), 0.0)
        values = jnp.einsum("bkgcs,bskh->bkgch", weights, cached, precision=lax.Precision.HIGHEST)
        return acc * rescale[..., None] + values, new_largest, total * rescale + weights.sum(axis=-1)

    lead = (num_rows, num_kv_heads, group, chunk)
    carry = (
        jnp.zeros((*lead, head_dim), jnp.float32),
        jnp.full(lead, _MASKED, jnp.float32),
        jnp.zeros(lead, jnp.float32),
    )
    first_block = jnp.maximum(first_key, 0) // block
    acc, _, total = lax.fori_loop(first_block, (num_keys + block - 1) // block, body, carry)
    out = acc / jnp.maximum(total, 1e-30)[..., None]  # [B, K, G, C, H]
    return out.transpose(0, 3, 1, 2, 4).reshape(num_rows, chunk, num_heads, head_dim).astype(q.dtype)
