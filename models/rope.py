"""Rotary position embeddings: one table of cosines and sines a step, which attention applies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.config import ModelConfig
from jaxserve.kernels_pallas.heads import RopeTable
from jaxserve.models.rope_frequencies import rope_frequencies


def rope_table(positions: jax.Array, config: ModelConfig) -> RopeTable:
    """The table for tokens at `positions` [T]."""
    frequencies, factor = rope_frequencies(config)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return RopeTable(jnp.cos(angles) * factor, jnp.sin(angles) * factor)
