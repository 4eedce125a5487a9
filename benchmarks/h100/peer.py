"""vLLM's figures on the same kind of machine, measured ceilings, and the floor under a decode step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxserve.config import ModelConfig

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
    read = weight_bytes(config) + batch * context * kv_bytes(config)
    return read / (PEER["bandwidth_tb_s"] * 1e12) * 1e3


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the matrices that a decode step reads, in bfloat16."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    return 2 * (config.num_layers * (attention + mlp) + head)


def kv_bytes(config: ModelConfig) -> int:
    """Bytes that one token takes in the KV cache, in bfloat16."""
    return 2 * config.num_layers * config.num_kv_heads * 2 * config.head_dim
