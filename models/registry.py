"""From a family's name to its model class and weight table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.llama import Llama, llama_weights
from jaxserve.models.mistral import Mistral, mistral_weights
from jaxserve.models.mixtral import Mixtral, mixtral_weights
from jaxserve.models.part import WHOLE, Part
from jaxserve.models.qwen2 import Qwen2, qwen2_weights
from jaxserve.models.qwen2_vl import Qwen2VL, qwen2_vl_weights
from jaxserve.models.qwen3 import Qwen3, qwen3_weights
from jaxserve.models.qwen3_moe import Qwen3Moe, qwen3_moe_weights
from jaxserve.models.weight_table import WeightTable


@dataclass(frozen=True, slots=True)
class Family:
    """What serving a model of this family takes."""

    model: type[DecoderModel]
    weights: Callable[[ModelConfig], WeightTable]
    language: type[DecoderModel] | None = (
        None  # the part of it that makes tokens, if there is a tower beside it
    )


FAMILIES = {
    "llama": Family(Llama, llama_weights),
    "mistral": Family(Mistral, mistral_weights),
    "qwen2": Family(Qwen2, qwen2_weights),
    "qwen3": Family(Qwen3, qwen3_weights),
    "mixtral": Family(Mixtral, mixtral_weights),
    "qwen3_moe": Family(Qwen3Moe, qwen3_moe_weights),
    "qwen2_vl": Family(Qwen2VL, qwen2_vl_weights, language=Qwen2),
    "qwen2_5_vl": Family(Qwen2VL, qwen2_vl_weights, language=Qwen2),
}


def family_of(config: ModelConfig) -> Family:
    """The family a config names; ConfigError, listing the known ones, for any other."""
    if config.family not in FAMILIES:
        raise ConfigError(
            f"model config: family {config.family!r} is unknown; known families: {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.family]


def build_model(config: ModelConfig, dtype: jnp.dtype, part: Part = WHOLE) -> DecoderModel:
    """The model, or a device's part of it, with all parameters zero.

    Under nnx.eval_shape: its shapes alone, nothing allocated.
    """
    return family_of(config).model(config, dtype, part)


def build_language_model(config: ModelConfig, dtype: jnp.dtype, part: Part = WHOLE) -> DecoderModel:
    """The same without a tower: what the programs that make tokens hold of it."""
    family = family_of(config)
    return (family.language or family.model)(config, dtype, part)
