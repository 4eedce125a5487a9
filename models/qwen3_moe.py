"""Qwen3 with experts: 30B-A3B, 235B-A22B, Coder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.decoder_weights import (
    attention_rows,
    block_norm_rows,
    decoder_table,
    expert_rows,
    mlp_rows,
    qk_norm_rows,
)
from jaxserve.models.weight_table import WeightRow, WeightTable


class Qwen3Moe(DecoderModel):
    """Qwen3's block; some layers, in published models all, have experts in place of the feed-forward."""

    fixed: ClassVar = {"mlp_bias": False, "qk_norm": True}
    may_slide = True
    has_experts = True


def qwen3_moe_weights(config: ModelConfig) -> WeightTable:
    """Qwen3's names, and in layers with experts those of each expert."""

    def layer_rows() -> Iterator[WeightRow]:
        for layer in range(config.num_layers):
            yield from block_norm_rows(config, layer)
            yield from attention_rows(config, layer, qkv_bias=config.qkv_bias, o_bias=config.o_bias)
            yield from qk_norm_rows(config, layer)
            if config.experts_of(layer):
                yield from expert_rows(config, layer, "mlp", gate="gate_proj", up="up_proj", down="down_proj")
            else:
                yield from mlp_rows(config, layer, bias=False)

    return decoder_table(config, layer_rows())
