"""From what the fused projection gives to queries, keys and values: head norms, then rotary positions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RopeTable(NamedTuple):
    """Cosine and sine of each token's angles, shared by all layers of a step."""

    cos: jax.Array  # [T, H/2] float32
    sin: jax.Array  # [T, H/2] float32


class HeadNorms(NamedTuple):
    """RMS norms over head_dim, applied to queries and keys before rope (Qwen 3)."""

    q_scale: jax.Array  # [H]
    k_scale: jax.Array  # [H]
    eps: float


def rotate(x: jax.Array, table: RopeTable) -> jax.Array:
    """Turn component i of every head of x [T, heads, H] together with component i + H/2, in x's dtype.

    Computed in float32: bfloat16 has 8 bits of mantissa, too few to tell neighbouring positions apart.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = table.cos[:, None, :], table.sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in x's dtype.

    Computed in float32, where squares of bfloat16 activations neither overflow nor lose their tail.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


def split_heads(
    qkv: jax.Array, rope: RopeTable, norms: HeadNorms | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """qkv [T, K, G + 2, H], each kv head's G queries, key and value, to q [T, K * G, H], k and v [T, K, H]."""
    num_tokens, _, _, head_dim = qkv.shape
    q = qkv[:, :, :-2].reshape(num_tokens, -1, head_dim)
    k, v = qkv[:, :, -2], qkv[:, :, -1]
    if norms is not None:
        q, k = rms_norm(q, norms.q_scale, norms.eps), rms_norm(k, norms.k_scale, norms.eps)
    return rotate(q, rope), rotate(k, rope), v
