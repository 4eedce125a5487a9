"""Attention without an order or pages, as towers of images have it: over whole images, and within windows."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.matmul import precision_of
from jaxserve.kernels_pallas.metadata import Backend

logger = logging.getLogger(__name__)

_MASKED = -1e30  # finite, so that rows without any visible key give something finite
SCORES = 1 << 24  # scores that exist at a time where there is no kernel: 64 MiB


class Windows(NamedTuple):
    """Where patches go to meet those of their window: W blocks of S slots, each with whole windows in it."""

    patches: (
        jax.Array
    )  # [W, S] int32, which of the call's patches stands in a slot; any of them in an empty one
    windows: jax.Array  # [W, S] int32, the slot's window; -1 of empty ones
    slots: jax.Array  # [T] int32, each patch's slot among the W * S; any of them for padding


def attend_whole(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, scale: float, backend: Backend
) -> jax.Array:
    """Every query to all keys of its row: q, k and v [B, P, N, H], of which the first `lengths` [B] are there.

    [B, P, N, H] in q's dtype; what is behind the lengths has no meaning.
    """
    if backend == "gpu" and q.dtype != jnp.float32:
        # Scores of 5,476 patches and 16 heads would be 2 GB of float32, which this never writes.
        try:
            return jax.nn.dot_product_attention(
                q, k, v, scale=scale, key_value_seq_lengths=jnp.maximum(lengths, 1), implementation="cudnn"
            )
        except RuntimeError as error:
            if "cuDNN" not in str(error):
                raise
            logger.warning("no cuDNN to attend to images with, which takes longer without: %s", error)
    rows, patches, heads, _ = q.shape
    is_key = jnp.arange(patches) < lengths[:, None]  # [B, P]
    block = math.gcd(patches, 1 << max(0, (SCORES // (rows * heads * patches)).bit_length() - 1))
    if block == patches:
        return _attend(q, k, v, is_key[:, None], scale)

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(q, index * block, block, axis=1)
        attended = _attend(part, k, v, is_key[:, None], scale)
        return jax.lax.dynamic_update_slice_in_dim(out, attended, index * block, axis=1)

    # Queries of padding are left out by whole blocks.
    return jax.lax.fori_loop(0, (jnp.max(lengths) + block - 1) // block, body, jnp.zeros_like(q))


def attend_windows(qkv: jax.Array, windows: Windows, scale: float) -> jax.Array:
    """Every query to the keys of its window: qkv [T, 3, N, H] to [T, N, H]."""
    blocks = jnp.take(qkv, windows.patches, axis=0, mode="clip")  # [W, S, 3, N, H]
    q, k, v = (blocks[:, :, part] for part in range(3))
    same = windows.windows[:, :, None] == windows.windows[:, None, :]
    out = _attend(q, k, v, same, scale)
    return jnp.take(out.reshape(-1, *out.shape[2:]), windows.slots, axis=0, mode="clip")


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scale: float) -> jax.Array:
    """q [B, Q, N, H], k and v [B, P, N, H], visible [B, 1 or Q, P]."""
    precision, wide = precision_of(q.dtype), jnp.float32
    scores = jnp.einsum("bqnh,bpnh->bnqp", q, k, precision=precision, preferred_element_type=wide) * scale
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, _MASKED), axis=-1).astype(q.dtype)
    return jnp.einsum("bnqp,bpnh->bqnh", weights, v, precision=precision).astype(q.dtype)
