"""Qwen2 and Qwen2.5 (dense), Qwen2.5-Coder among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.decoder_weights import attention_rows, block_norm_rows, decoder_table, mlp_rows
from jaxserve.models.weight_table import WeightRow, WeightTable


class Qwen2(DecoderModel):
    """Llama's block with biases on queries, keys and values alone; upper layers may slide a window."""

    fixed: ClassVar = {"qkv_bias": True, "o_bias": False, "mlp_bias": False, "qk_norm": False}
    may_slide = True


def qwen2_weights(config: ModelConfig) -> WeightTable:
    """Biases for q, k and v in every layer, whatever attention_bias would say: the architecture has them."""

    def layer_rows() -> Iterator[WeightRow]:
        for layer in range(config.num_layers):
            yield from block_norm_rows(config, layer)
            yield from attention_rows(config, layer, qkv_bias=True, o_bias=False)
            yield from mlp_rows(config, layer, bias=False)

    return decoder_table(config, layer_rows())
