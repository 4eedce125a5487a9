"""A GGUF file as a checkpoint: tensors under Hugging Face names and in Hugging Face layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import TensorInfo
from jaxserve.loading.fields import Fields
from jaxserve.loading.gguf_config import generation_defaults_from_gguf, model_config_from_gguf
from jaxserve.loading.gguf_dequantize import can_dequantize, dequantize
from jaxserve.loading.gguf_file import GGUFTensor, read_gguf_header
from jaxserve.loading.safetensors_file import map_file, release

_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's frequency scaling, which belongs to the config

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Of layers with experts, by architecture: the block's name, that of each matrix of an expert.
_EXPERT_NAMES = {
    "llama": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
_EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
_ROUTER_TENSOR = re.compile(r"blk\.(\d+)\.ffn_gate_inp\.weight")
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    A name without a counterpart is given back as it is: the model's weight table refuses it by name.
    """
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return name
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def hugging_face_tensors(tensor: GGUFTensor, architecture: str) -> Iterator[tuple[str, GGUFTensor]]:
    """The tensor under its Hugging Face name; if it holds all experts of a layer, the matrix of each under its own."""
    block, parts = _EXPERT_NAMES.get(architecture, ("", {}))
    if parts and (match := _ROUTER_TENSOR.fullmatch(tensor.name)):
        yield f"model.layers.{match[1]}.{block}.gate.weight", tensor
    elif parts and len(tensor.shape) == 3 and (match := _EXPERT_TENSOR.fullmatch(tensor.name)):
        count, *shape = tensor.shape
        size = tensor.num_bytes // count
        for expert in range(count):
            name = f"model.layers.{match[1]}.{block}.experts.{expert}.{parts[match[2]]}.weight"
            start = tensor.start + expert * size
            yield name, replace(tensor, shape=tuple(shape), start=start, num_bytes=size)
    else:
        yield hugging_face_name(tensor.name), tensor


def unpermute_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the row order that llama.cpp's converter gives to the q and k projections of its arch "llama".

    llama.cpp rotates neighbouring components there, Hugging Face rotates component i with i + H/2, so the
    converter interleaves the two halves of each head.  `rows` is [heads * H, ...], and so is the result.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [heads, H/2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


class GGUFCheckpoint:
    """An opened .gguf file; implements jaxserve.loading.checkpoint.Checkpoint.

    `fields` is the file's metadata (tokenizer and chat template included), in plain Python values.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header; no tensor data is touched.

        Raises CheckpointError for a damaged or truncated file, an unsupported architecture or block type.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        header = read_gguf_header(path)
        self.path = path
        self.fields: Mapping[str, Any] = header.fields
        num_parts = Fields(header.fields, str(path)).integer("split.count", absent=1)
        if num_parts > 1:
            raise CheckpointError(
                f"{path}: one of {num_parts} parts of a split GGUF; join them with "
                "`llama-gguf-split --merge` and give the result"
            )
        self._map = map_file(path)
        self._data = np.frombuffer(self._map, np.uint8)
        factors = header.tensors.get(_ROPE_FACTORS)
        self.config = model_config_from_gguf(
            header.fields,
            header.tensors.keys(),
            str(path),
            rope_factors=None if factors is None else self._rope_factors(factors),
        )
        self.defaults = generation_defaults_from_gguf(header.fields)
        unreadable = {kind for kind in {t.kind for t in header.tensors.values()} if not can_dequantize(kind)}
        self._by_name: dict[str, GGUFTensor] = {}
        for tensor in header.tensors.values():
            if tensor.kind in unreadable:
                what = f"tensor {tensor.name!r} is stored as {tensor.kind.name}"
                raise CheckpointError(f"{path}: {what}, which is no supported kind of weights")
            for name, part in hugging_face_tensors(tensor, header.fields["general.architecture"]):
                if name in self._by_name:
                    both = f"{self._by_name[name].name!r} and {tensor.name!r}"
                    raise CheckpointError(f"{path}: tensors {both} are the same one by different names")
                if tensor.name != _ROPE_FACTORS:
                    self._by_name[name] = part
        self._heads_of_permuted = self._find_permuted()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(t.shape, t.kind.name) for name, t in self._by_name.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face layout: float32, or for F32, F16 and BF16 a view of the file."""
        tensor = self._by_name[name]
        raw = self._bytes(tensor)
        num_heads = self._heads_of_permuted.get(name)
        if num_heads is not None:
            # A block never crosses a row, so the rows can be put in order while they are still small.
            raw = unpermute_rows(raw.reshape(tensor.shape[0], -1), num_heads).reshape(-1)
        return dequantize(raw, tensor.kind).reshape(tensor.shape)

    def release(self, name: str) -> None:
        """See Checkpoint.release."""
        tensor = self._by_name[name]
        release(self._map, tensor.start, tensor.start + tensor.num_bytes)

    def _bytes(self, tensor: GGUFTensor) -> np.ndarray:
        return self._data[tensor.start : tensor.start + tensor.num_bytes]

    def _rope_factors(self, tensor: GGUFTensor) -> np.ndarray:
        if tensor.kind != GGMLQuantizationType.F32:
            raise CheckpointError(
                f"{self.path}: {tensor.name} is stored as {tensor.kind.name}; it must be F32"
            )
        return dequantize(self._bytes(tensor), tensor.kind)

    def _find_permuted(self) -> dict[str, int]:
        """Names of the tensors whose rows are interleaved, and over how many heads."""
        if self.fields["general.architecture"] != "llama":
            return {}
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        found: dict[str, int] = {}
        for name, tensor in self._by_name.items():
            num_heads = heads.get(name.rpartition(".")[0].rpartition(".")[2])
            if num_heads is None:
                continue
            if tensor.shape[0] % (2 * num_heads) or tensor.num_bytes % tensor.shape[0]:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r}, {tensor.kind.name} of shape {tensor.shape}, "
                    f"does not divide into {num_heads} heads of even width"
                )
            found[name] = num_heads
        return found
