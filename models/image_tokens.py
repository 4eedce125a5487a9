"""What a language model that sees is told of a step's images: which embeddings to take, and where tokens stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.kernels_pallas.heads import RopeTable
from jaxserve.models.rope_frequencies import rope_frequencies


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "rows", "embeddings"], meta_fields=[])
@dataclass(frozen=True)
class ImageTokens:
    """Beside a step's T tokens."""

    positions: jax.Array  # [3, T] int32: time, row and column, by which a token's heads are rotated
    rows: jax.Array  # [T] int32, the row of `embeddings` that stands for the token; -1 for tokens of text
    embeddings: jax.Array  # [R, D], what towers have made of images

    def splice(self, x: jax.Array) -> jax.Array:
        """Embeddings x [T, D] of the tokens' ids, with images' tokens in their places."""
        seen = jnp.take(self.embeddings, jnp.maximum(self.rows, 0), axis=0, mode="clip")
        return jnp.where((self.rows >= 0)[:, None], seen.astype(x.dtype), x)

    def rope_table(self, config: ModelConfig) -> RopeTable:
        """M-RoPE: a head's first pairs turn by time, the next ones by row, the last by column."""
        assert config.vision is not None
        frequencies, factor = rope_frequencies(config)
        part_of_pair = np.repeat(np.arange(3), config.vision.mrope_sections)  # [H/2]
        angles = self.positions.astype(jnp.float32)[part_of_pair].T * frequencies
        return RopeTable(jnp.cos(angles) * factor, jnp.sin(angles) * factor)
