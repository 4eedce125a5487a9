"""Writes a GGUF Llama as a Hugging Face directory in bfloat16, as the recorded vLLM server had it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint


def write_bfloat16_directory(gguf_file: Path, directory: Path) -> None:
    """config.json, generation_config.json and model.safetensors; the tokenizer stays in the GGUF file."""
    checkpoint = GGUFCheckpoint(gguf_file)
    config = checkpoint.config
    assert config.family == "llama"
    assert config.rope_scaling is None
    description = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
        "torch_dtype": "bfloat16",
    }
    generation = {"eos_token_id": list(checkpoint.defaults.eos_token_ids)}
    (directory / "config.json").write_text(json.dumps(description))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tensors = {
        name: np.ascontiguousarray(checkpoint.read(name).astype(ml_dtypes.bfloat16))
        for name in checkpoint.tensors
    }
    save_file(tensors, directory / "model.safetensors")
