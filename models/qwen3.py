"""Qwen3 (dense)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.decoder_weights import (
    attention_rows,
    block_norm_rows,
    decoder_table,
    mlp_rows,
    qk_norm_rows,
)
from jaxserve.models.weight_table import WeightRow, WeightTable


class Qwen3(DecoderModel):
    """Llama's block, but every query and key head is RMS-normed before rotation; upper layers may slide."""

    fixed: ClassVar = {"mlp_bias": False, "qk_norm": True}
    may_slide = True


def qwen3_weights(config: ModelConfig) -> WeightTable:
    """One q_norm and one k_norm a layer, shared by its heads; attention biases where the config has them."""

    def layer_rows() -> Iterator[WeightRow]:
        for layer in range(config.num_layers):
            yield from block_norm_rows(config, layer)
            yield from attention_rows(config, layer, qkv_bias=config.qkv_bias, o_bias=config.o_bias)
            yield from qk_norm_rows(config, layer)
            yield from mlp_rows(config, layer, bias=False)

    return decoder_table(config, layer_rows())
