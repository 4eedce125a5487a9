"""From the fused projection to queries ready to attend, and keys and values in their pages: one Triton kernel.

XLA reads the projection three times for it, and writes keys and values to memory once more before they reach a page.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.kernels_pallas.heads import HeadNorms, RopeTable
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.pages import to_page
from jaxserve.kernels_pallas.powers_of_two import power_of_two_parts

_TOKENS = 16  # of one program


@partial(jax.jit, static_argnames="interpret")
def split_and_write(
    qkv: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    rope: RopeTable,
    norms: HeadNorms | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """heads.split_heads of qkv [T, K, G + 2, H], with keys and values put into kv_pages [P, S, K, 2, H].

    Returns the queries [T, K * G, H] in qkv's dtype and the pages, in place when these are donated.
    """
    num_tokens, num_kv_heads, columns, head_dim = qkv.shape
    group = columns - 2
    args: list[Any] = [meta.positions, meta.token_rows, meta.page_table, rope.cos, rope.sin, qkv, kv_pages]
    if norms is not None:
        args += [norms.q_scale, norms.k_scale, jnp.full((1,), norms.eps, jnp.float32)]
    queries, kv_pages = pl.pallas_call(
        partial(_kernel, page_size=kv_pages.shape[1]),
        grid=(pl.cdiv(num_tokens, _TOKENS), num_kv_heads),
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, num_kv_heads * group, head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        ],
        input_output_aliases={6: 1},
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="split_and_write",
    )(*args)
    return queries, kv_pages


def _kernel(
    positions_ref: Any,
    rows_ref: Any,
    table_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    qkv_ref: Any,
    _: Any,
    *refs: Any,
    page_size: int,
) -> None:
    """Program (tokens, kv head)."""
    *norm_refs, queries_ref, pages_ref = refs
    num_tokens, _, columns, head_dim = qkv_ref.shape
    group, half = columns - 2, head_dim // 2
    # Surplus lanes compute and write the last token once more.
    first = pl.program_id(0) * _TOKENS
    tokens = jnp.minimum(first + jnp.arange(_TOKENS, dtype=jnp.int32), num_tokens - 1)
    head = pl.program_id(1)
    positions = positions_ref[tokens]
    pages, offsets = table_ref[rows_ref[tokens], positions // page_size], positions % page_size
    halves = [(pl.ds(start, size), pl.ds(half + start, size)) for start, size in power_of_two_parts(half)]
    angles = [(cos_ref[tokens, part], sin_ref[tokens, part]) for part, _ in halves]

    def rotated(column: int, scale_ref: Any) -> list[tuple[pl.Slice, jax.Array]]:
        """The column's slices of each head with their values, normalised and rotated, float32."""
        pairs = [tuple(_wide(qkv_ref[tokens, head, column, part]) for part in parts) for parts in halves]
        if scale_ref is not None:
            squares = sum(jnp.sum(x * x, axis=1) for pair in pairs for x in pair)
            factor = jax.lax.rsqrt(squares / head_dim + norm_refs[2][0])[:, None]
            pairs = [
                tuple(
                    _wide((x * factor * _wide(scale_ref[part])[None]).astype(qkv_ref.dtype))
                    for x, part in zip(pair, parts, strict=True)
                )
                for pair, parts in zip(pairs, halves, strict=True)
            ]
        turned = []
        for (one, two), (low, high), (cos, sin) in zip(pairs, halves, angles, strict=True):
            turned += [(low, one * cos - two * sin), (high, two * cos + one * sin)]
        return turned

    q_scale, k_scale = norm_refs[:2] if norm_refs else (None, None)
    for column in range(group):
        for part, values in rotated(column, q_scale):
            queries_ref[tokens, head * group + column, part] = values.astype(queries_ref.dtype)
    for part, values in rotated(group, k_scale):
        pages_ref[pages, offsets, head, 0, part] = to_page(values.astype(qkv_ref.dtype), pages_ref.dtype)
    for part in (pl.ds(*part) for part in power_of_two_parts(head_dim)):
        values = qkv_ref[tokens, head, group + 1, part]
        pages_ref[pages, offsets, head, 1, part] = to_page(values, pages_ref.dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
