"""Paged attention: write this step's keys and values into the cache, then attend to it."""

from __future__ import annotations

import jax

from jaxserve.kernels_pallas.metadata import AttentionMetadata


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of a ragged batch of new tokens over each sequence's pages.

    q [T, N, H], k and v [T, K, H] (rope applied), kv_pages [P, S, K, 2, H] (keys at index 0, values at 1; donated).
    A token sees the positions of its own sequence up to its own, at most the last `window` of them if given.
    `soft_cap` c replaces a score s by c * tanh(s / c).  Returns the output [T, N, H] in q's dtype, and the pages.
    """
    from jaxserve.kernels_pallas import xla

    kv_pages = xla.write_kv(kv_pages, k, v, meta)
    return xla.attend(q, kv_pages, meta, scale=scale, window=window, soft_cap=soft_cap), kv_pages
