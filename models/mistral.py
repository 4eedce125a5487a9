"""Mistral 7B and its successors of the same architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.decoder_weights import attention_rows, block_norm_rows, decoder_table, mlp_rows
from jaxserve.models.weight_table import WeightRow, WeightTable


class Mistral(DecoderModel):
    """Llama's block without any bias; version 0.1 slides a window over every layer, later ones over none."""

    fixed: ClassVar = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False}
    may_slide = True


def mistral_weights(config: ModelConfig) -> WeightTable:
    """Bare matrices and norms: a bias in the checkpoint is an error."""

    def layer_rows() -> Iterator[WeightRow]:
        for layer in range(config.num_layers):
            yield from block_norm_rows(config, layer)
            yield from attention_rows(config, layer, qkv_bias=False, o_bias=False)
            yield from mlp_rows(config, layer, bias=False)

    return decoder_table(config, layer_rows())
