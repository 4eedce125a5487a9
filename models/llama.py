"""Llama (2, 3, 3.1, 3.2) and those built like it, SmolLM2 among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.decoder_weights import attention_rows, block_norm_rows, decoder_table, mlp_rows
from jaxserve.models.weight_table import WeightRow, WeightTable


class Llama(DecoderModel):
    """The plain decoder: full attention; biases on all projections of a kind or on none; any rope scaling."""

    fixed: ClassVar = {"qk_norm": False}


def llama_weights(config: ModelConfig) -> WeightTable:
    """Attention and feed-forward biases where the config has them."""

    def layer_rows() -> Iterator[WeightRow]:
        for layer in range(config.num_layers):
            yield from block_norm_rows(config, layer)
            yield from attention_rows(config, layer, qkv_bias=config.qkv_bias, o_bias=config.o_bias)
            yield from mlp_rows(config, layer, bias=config.mlp_bias)

    return decoder_table(config, layer_rows())
