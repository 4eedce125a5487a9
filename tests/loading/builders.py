"""Small checkpoints on disk: GGUF files and Hugging Face directories with random weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from safetensors.numpy import save_file

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, FFN, VOCAB = 2, 4, 2, 64, 256, 512, 40
EXPERTS, EXPERT_FFN = 3, 256
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "max_position_embeddings": 128,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": VOCAB,
    "eos_token_id": 2,
}


def hf_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the small Llama."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (WIDTH,),
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            prefix + "post_attention_layernorm.weight": (WIDTH,),
            prefix + "mlp.gate_proj.weight": (FFN, WIDTH),
            prefix + "mlp.up_proj.weight": (FFN, WIDTH),
            prefix + "mlp.down_proj.weight": (WIDTH, FFN),
        }
    return shapes


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_hf_directory(directory: Path, tensors: Mapping[str, np.ndarray], num_shards: int = 1) -> None:
    """config.json and the tensors in `num_shards` files, with an index if there are several."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(HF_CONFIG))
    if num_shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {
        name: f"model-{number % num_shards + 1:05}-of-{num_shards:05}.safetensors"
        for number, name in enumerate(tensors)
    }
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, directory / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_safetensors(path: Path, header: object, data: bytes) -> None:
    """A file with any header at all, where the safetensors package would refuse to write it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def gguf_shapes(*, biases: bool = False, qk_norm: bool = False) -> dict[str, tuple[int, ...]]:
    """The small model's tensors under GGUF's names, shapes as numpy has them."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (VOCAB, WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        shapes |= {
            prefix + "attn_norm.weight": (WIDTH,),
            prefix + "attn_q.weight": (HEADS * HEAD_DIM, WIDTH),
            prefix + "attn_k.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            prefix + "attn_v.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            prefix + "attn_output.weight": (WIDTH, HEADS * HEAD_DIM),
            prefix + "ffn_norm.weight": (WIDTH,),
            prefix + "ffn_gate.weight": (FFN, WIDTH),
            prefix + "ffn_up.weight": (FFN, WIDTH),
            prefix + "ffn_down.weight": (WIDTH, FFN),
        }
        if biases:
            shapes |= {prefix + "attn_q.bias": (HEADS * HEAD_DIM,)}
            shapes |= {prefix + f"attn_{x}.bias": (KV_HEADS * HEAD_DIM,) for x in "kv"}
        if qk_norm:
            shapes |= {prefix + f"attn_{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    return shapes


def gguf_expert_shapes(ffn: int) -> dict[str, tuple[int, ...]]:
    """Of the small model with experts of width `ffn`, in place of its feed-forwards."""
    shapes = {name: shape for name, shape in gguf_shapes().items() if not name.startswith("ffn", 6)}
    shapes |= {f"blk.{layer}.ffn_norm.weight": (WIDTH,) for layer in range(LAYERS)}
    for layer in range(LAYERS):
        prefix = f"blk.{layer}.ffn_"
        shapes |= {
            prefix + "gate_inp.weight": (EXPERTS, WIDTH),
            prefix + "gate_exps.weight": (EXPERTS, ffn, WIDTH),
            prefix + "up_exps.weight": (EXPERTS, ffn, WIDTH),
            prefix + "down_exps.weight": (EXPERTS, WIDTH, ffn),
        }
    return shapes


def random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """Bytes of a tensor of `shape`.  None is above 0x3B, so that every float16 scale in them is finite."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = shape[-1] // block_size * block_bytes
    return np.random.default_rng(seed).integers(0, 0x3C, (*shape[:-1], row_bytes), np.uint8)


def gguf_writer(path: Path, architecture: str = "llama") -> GGUFWriter:
    """A writer that has the small model's metadata already."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["t", "o", "to", *(f"tokén{i}" for i in range(3, VOCAB))])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["t o"])
    writer.add_eos_token_id(2)
    return writer


def finish(writer: GGUFWriter) -> None:
    """Write out what the writer has been given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    path: Path, tensors: Mapping[str, np.ndarray], architecture: str = "llama"
) -> Mapping[str, np.ndarray]:
    """A whole small model of float tensors."""
    writer = gguf_writer(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    finish(writer)
    return tensors
