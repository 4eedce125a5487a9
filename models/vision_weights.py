"""Rows of the weight table for a vision tower, under the tensor names of published checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.models.weight_table import ParameterPath, WeightRow

_NAME, _PATH = "visual", ("visual",)


def vision_rows(config: ModelConfig) -> Iterator[WeightRow]:
    """All of the tower, which stands at `visual` in the model."""
    vision = config.vision
    assert vision is not None
    embed, merged = vision.hidden_size, vision.hidden_size * vision.merged_patches
    has_windows = vision.window_size is not None
    patch = (vision.num_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)

    def as_patches(kernel: np.ndarray) -> np.ndarray:
        return np.moveaxis(kernel.reshape(embed, *patch[:2], -1), 0, -1)  # [C, T, pixels, D]

    yield WeightRow(
        (*_PATH, "patch_embedding"), {f"{_NAME}.patch_embed.proj.weight": (embed, *patch)}, as_patches
    )
    for layer in range(vision.num_layers):
        name, path = f"{_NAME}.blocks.{layer}", (*_PATH, "layers", layer)
        yield from _norm((*path, "attention_norm"), f"{name}.norm1", embed, has_bias=not has_windows)
        yield from _qkv((*path, "qkv"), f"{name}.attn.qkv", vision.num_heads, vision.head_dim)
        yield from _linear((*path, "o"), f"{name}.attn.proj", embed, embed)
        yield from _norm((*path, "mlp_norm"), f"{name}.norm2", embed, has_bias=not has_windows)
        ffn = vision.intermediate_size
        if has_windows:
            yield from _gate_up((*path, "mlp", "gate_up"), f"{name}.mlp", embed, ffn)
            yield from _linear((*path, "mlp", "down"), f"{name}.mlp.down_proj", ffn, embed)
        else:
            yield from _linear((*path, "mlp", "up"), f"{name}.mlp.fc1", embed, ffn)
            yield from _linear((*path, "mlp", "down"), f"{name}.mlp.fc2", ffn, embed)
    yield from _norm((*_PATH, "merger_norm"), f"{_NAME}.merger.ln_q", embed, has_bias=not has_windows)
    yield from _linear((*_PATH, "merger_up"), f"{_NAME}.merger.mlp.0", merged, merged)
    yield from _linear((*_PATH, "merger_down"), f"{_NAME}.merger.mlp.2", merged, config.hidden_size)


def _norm(path: ParameterPath, name: str, size: int, *, has_bias: bool) -> Iterator[WeightRow]:
    yield WeightRow((*path, "scale"), {f"{name}.weight": (size,)}, _as_is)
    if has_bias:
        yield WeightRow((*path, "bias"), {f"{name}.bias": (size,)}, _as_is)


def _linear(path: ParameterPath, name: str, inputs: int, outputs: int) -> Iterator[WeightRow]:
    yield WeightRow((*path, "weight"), {f"{name}.weight": (outputs, inputs)}, np.transpose)
    yield WeightRow((*path, "bias"), {f"{name}.bias": (outputs,)}, _as_is)


def _qkv(path: ParameterPath, name: str, heads: int, head_dim: int) -> Iterator[WeightRow]:
    """Queries, keys and values are one weight in the checkpoint too."""
    embed = heads * head_dim

    def split(tensor: np.ndarray) -> np.ndarray:
        return np.moveaxis(tensor.reshape(3, heads, head_dim, *tensor.shape[1:]), 3, 0)

    def split_bias(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(3, heads, head_dim)

    yield WeightRow((*path, "weight"), {f"{name}.weight": (3 * embed, embed)}, split)
    yield WeightRow((*path, "bias"), {f"{name}.bias": (3 * embed,)}, split_bias)


def _gate_up(path: ParameterPath, name: str, embed: int, ffn: int) -> Iterator[WeightRow]:
    def fuse(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.stack([gate, up]), -1, 0)

    def fuse_bias(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.stack([gate, up])

    parts = ("gate_proj", "up_proj")
    weights = {f"{name}.{part}.weight": (ffn, embed) for part in parts}
    yield WeightRow((*path, "weight"), weights, fuse)
    yield WeightRow((*path, "bias"), {f"{name}.{part}.bias": (ffn,) for part in parts}, fuse_bias)


def _as_is(tensor: np.ndarray) -> np.ndarray:
    return tensor
