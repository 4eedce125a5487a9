"""Mixtral 8x7B and 8x22B."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.decoder_weights import attention_rows, block_norm_rows, decoder_table, expert_rows
from jaxserve.models.weight_table import WeightRow, WeightTable


class Mixtral(DecoderModel):
    """Mistral's block with experts in every layer."""

    fixed: ClassVar = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False}
    may_slide = True
    has_experts = True


def mixtral_weights(config: ModelConfig) -> WeightTable:
    """Bare matrices and norms; an expert's gate, down and up are its w1, w2 and w3."""

    def layer_rows() -> Iterator[WeightRow]:
        for layer in range(config.num_layers):
            yield from block_norm_rows(config, layer)
            yield from attention_rows(config, layer, qkv_bias=False, o_bias=False)
            yield from expert_rows(config, layer, "block_sparse_moe", gate="w1", up="w3", down="w2")

    return decoder_table(config, layer_rows())
