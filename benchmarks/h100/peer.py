"""vLLM's figures on the same kind of machine, measured ceilings, and the floor under a decode step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxserve.config import ExpertsConfig, ModelConfig

PEER: dict[str, Any] = json.loads((Path(__file__).parent / "peer.json").read_text(encoding="utf-8"))


def peer_value(model: str, *keys: str | int) -> float | None:
    """A figure of peer.json under its model, None where there is none."""
    value: Any = PEER["models"].get(model, {})
    for key in keys:
        if not isinstance(value, dict) or str(key) not in value:
            return None
        value = value[str(key)]
    return value


def floor_ms(model: str, config: ModelConfig, batch: int, context: int) -> float:
    """The least a decode step can take: the measured floor where there is one, else bytes over bandwidth.

    Bytes are the weights and each sequence's keys and values, read once in bfloat16; `context` in tokens.
    """
    measured = peer_value(model, "floor_ms", batch)
    if measured is not None:
        return measured
    read = weight_bytes(config, batch) + batch * context * kv_bytes(config)
    return read / (PEER["bandwidth_tb_s"] * 1e12) * 1e3


def weight_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes of the matrices that a decode step of `batch` tokens reads, in bfloat16; of experts, those in use."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    numbers = config.vocab_size * config.hidden_size + config.num_layers * attention
    for layer in range(config.num_layers):
        experts = config.experts_of(layer)
        if experts is None:
            numbers += 3 * config.hidden_size * config.intermediate_size
        else:
            one = 3 * config.hidden_size * experts.intermediate_size
            router = config.hidden_size * experts.num_experts
            numbers += router + round(one * experts_in_use(experts, batch))
    return 2 * numbers


def experts_in_use(experts: ExpertsConfig, batch: int) -> float:
    """Experts of a layer that `batch` tokens take together if each takes any with equal chances: the mean number."""
    left_out = 1 - experts.num_per_token / experts.num_experts
    return experts.num_experts * (1 - left_out**batch)


def kv_bytes(config: ModelConfig) -> int:
    """Bytes that one token takes in the KV cache, in bfloat16."""
    return 2 * config.num_layers * config.num_kv_heads * 2 * config.head_dim
