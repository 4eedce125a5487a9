"""Qwen2-VL and Qwen2.5-VL: Qwen2 with a vision tower."""

from __future__ import annotations

import jax.numpy as jnp

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.models.part import WHOLE, Part
from jaxserve.models.qwen2 import Qwen2, qwen2_weights
from jaxserve.models.vision_tower import VisionTower
from jaxserve.models.vision_weights import vision_rows
from jaxserve.models.weight_table import WeightTable


class Qwen2VL(Qwen2):
    """The language model, which is Qwen2's, and beside it the tower, whose tokens it takes for embeddings.

    The engine runs the two in programs of their own (towers.py).  `part` is of the language model alone.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, part: Part = WHOLE) -> None:
        super().__init__(config, dtype, part)
        if config.vision is None:
            raise ConfigError(f"model config: vision is None; family {config.family!r} cannot do without")
        self.visual = VisionTower(config.vision, config.hidden_size, dtype)


def qwen2_vl_weights(config: ModelConfig) -> WeightTable:
    """Qwen2's rows and the tower's."""
    language = qwen2_weights(config)
    return WeightTable((*language.rows, *vision_rows(config)), language.ignored, language.copies)
