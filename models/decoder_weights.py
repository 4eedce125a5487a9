"""Rows of the weight table for the parts of a decoder, under the tensor names of Hugging Face checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.models.weight_table import ParameterPath, WeightRow, WeightTable

# Rotary frequencies, which early checkpoints saved along: they follow from the config.
_NOT_WEIGHTS = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")


def decoder_table(config: ModelConfig, layer_rows: Iterator[WeightRow]) -> WeightTable:
    """The given rows, with those of embedding, final norm and output head around them."""
    embedding_shape = (config.vocab_size, config.hidden_size)
    rows = [
        WeightRow(("embedding",), {"model.embed_tokens.weight": embedding_shape}, _as_is),
        *layer_rows,
        _norm_row(("norm", "scale"), "model.norm", config.hidden_size),
    ]
    if config.tie_word_embeddings:
        # Some tools write a tied head out all the same.  One that differs means that the config is wrong.
        return WeightTable(tuple(rows), _NOT_WEIGHTS, {"lm_head.weight": "model.embed_tokens.weight"})
    rows.append(WeightRow(("lm_head",), {"lm_head.weight": embedding_shape}, np.transpose))
    return WeightTable(tuple(rows), _NOT_WEIGHTS)


def block_norm_rows(config: ModelConfig, layer: int) -> Iterator[WeightRow]:
    """The norms before attention and before the feed-forward."""
    for parameter, name in (
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
    ):
        yield _norm_row(
            ("layers", layer, parameter, "scale"), f"model.layers.{layer}.{name}", config.hidden_size
        )


def attention_rows(config: ModelConfig, layer: int, *, qkv_bias: bool, o_bias: bool) -> Iterator[WeightRow]:
    """q, k and v fused to [D, K, G + 2, H] (see Attention), o as [N, H, D], and their biases if any."""
    embed, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    head_dim = config.head_dim
    name, path = f"model.layers.{layer}.self_attn", ("layers", layer, "attention")
    rows_of = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}

    def fuse(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        by_kv_head = [part.reshape(kv_heads, -1, head_dim, *part.shape[1:]) for part in (q, k, v)]
        return np.concatenate(by_kv_head, axis=1)  # [K, G + 2, H] and, of a weight, D

    def fuse_weight(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.moveaxis(fuse(q, k, v), -1, 0)

    def split_heads(o: np.ndarray) -> np.ndarray:
        return np.transpose(o).reshape(heads, head_dim, embed)

    weights = {f"{name}.{part}.weight": (rows, embed) for part, rows in rows_of.items()}
    yield WeightRow((*path, "qkv"), weights, fuse_weight)
    yield WeightRow((*path, "o"), {f"{name}.o_proj.weight": (embed, heads * head_dim)}, split_heads)
    if qkv_bias:
        biases = {f"{name}.{part}.bias": (rows,) for part, rows in rows_of.items()}
        yield WeightRow((*path, "qkv_bias"), biases, fuse)
    if o_bias:
        yield WeightRow((*path, "o_bias"), {f"{name}.o_proj.bias": (embed,)}, _as_is)


def qk_norm_rows(config: ModelConfig, layer: int) -> Iterator[WeightRow]:
    """The norms over each query head and each key head."""
    for part in ("q_norm", "k_norm"):
        path = ("layers", layer, "attention", part, "scale")
        yield _norm_row(path, f"model.layers.{layer}.self_attn.{part}", config.head_dim)


def mlp_rows(config: ModelConfig, layer: int, *, bias: bool) -> Iterator[WeightRow]:
    """gate and up fused to [D, 2, F], down as [F, D], and their biases where there are any."""
    embed, ffn = config.hidden_size, config.intermediate_size
    name, path = f"model.layers.{layer}.mlp", ("layers", layer, "mlp")

    def fuse_weight(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.stack([gate, up]), -1, 0)

    def fuse_bias(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.stack([gate, up])

    weights = {f"{name}.{part}.weight": (ffn, embed) for part in ("gate_proj", "up_proj")}
    yield WeightRow((*path, "gate_up"), weights, fuse_weight)
    yield WeightRow((*path, "down"), {f"{name}.down_proj.weight": (embed, ffn)}, np.transpose)
    if bias:
        biases = {f"{name}.{part}.bias": (ffn,) for part in ("gate_proj", "up_proj")}
        yield WeightRow((*path, "gate_up_bias"), biases, fuse_bias)
        yield WeightRow((*path, "down_bias"), {f"{name}.down_proj.bias": (embed,)}, _as_is)


def expert_rows(
    config: ModelConfig, layer: int, block: str, *, gate: str, up: str, down: str
) -> Iterator[WeightRow]:
    """The router as [D, E], all experts' gates and ups in turns as [E, D, 2F], their downs as [E, F, D].

    In the checkpoint each expert has matrices of its own, called `gate`, `up` and `down`, under the layer's `block`.
    """
    assert config.experts is not None
    embed, ffn, count = config.hidden_size, config.experts.intermediate_size, config.experts.num_experts
    name, path = f"model.layers.{layer}.{block}", ("layers", layer, "mlp")

    def names(*parts: str) -> list[str]:
        return [f"{name}.experts.{expert}.{part}.weight" for expert in range(count) for part in parts]

    def weave(*matrices: np.ndarray) -> np.ndarray:
        rows = np.empty((count, ffn, 2, embed), matrices[0].dtype)
        for index, matrix in enumerate(matrices):
            rows[index // 2, :, index % 2] = matrix
        return np.moveaxis(rows.reshape(count, 2 * ffn, embed), -1, 1)

    def stack(*matrices: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.stack(matrices), -1, 1)

    yield WeightRow((*path, "router"), {f"{name}.gate.weight": (count, embed)}, np.transpose)
    yield WeightRow((*path, "expert_gate_up"), dict.fromkeys(names(gate, up), (ffn, embed)), weave)
    yield WeightRow((*path, "expert_down"), dict.fromkeys(names(down), (embed, ffn)), stack)


def _norm_row(path: ParameterPath, name: str, size: int) -> WeightRow:
    return WeightRow(path, {f"{name}.weight": (size,)}, _as_is)


def _as_is(tensor: np.ndarray) -> np.ndarray:
    return tensor
