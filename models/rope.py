"""Rotary position embeddings: one table of cosines and sines a step, applied to queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.config import ModelConfig
from jaxserve.models.rope_frequencies import rope_frequencies


class RopeTable(NamedTuple):
    """Cosine and sine of each token's angles, shared by all layers of a step."""

    cos: jax.Array  # [T, H/2] float32
    sin: jax.Array  # [T, H/2] float32


def rope_table(positions: jax.Array, config: ModelConfig) -> RopeTable:
    """The table for tokens at `positions` [T]."""
    frequencies, factor = rope_frequencies(config)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return RopeTable(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: jax.Array, table: RopeTable) -> jax.Array:
    """Turn component i of every head of x [T, heads, H] together with component i + H/2, in x's dtype.

    Computed in float32: bfloat16 has 8 bits of mantissa, too few to tell neighbouring positions apart.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = table.cos[:, None, :], table.sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
