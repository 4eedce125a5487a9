"""Writes a GGUF Llama as a Hugging Face directory in bfloat16, as the recorded vLLM server had it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint
from jaxserve.loading.hf_export import hf_config_of


def write_bfloat16_directory(gguf_file: Path, directory: Path) -> None:
    """config.json, generation_config.json and model.safetensors; the tokenizer stays in the GGUF file."""
    checkpoint = GGUFCheckpoint(gguf_file)
    description = {**hf_config_of(checkpoint.config, str(gguf_file)), "torch_dtype": "bfloat16"}
    generation = {"eos_token_id": list(checkpoint.defaults.eos_token_ids)}
    (directory / "config.json").write_text(json.dumps(description))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tensors = {
        name: np.ascontiguousarray(checkpoint.read(name).astype(ml_dtypes.bfloat16))
        for name in checkpoint.tensors
    }
    save_file(tensors, directory / "model.safetensors")
