"""Tiny models of every family as directories in Hugging Face layout, and their parameters to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxserve.loading.resolve import open_checkpoint
from jaxserve.loading.weights import load_model
from jaxserve.models.parameters import parameter_name
from tests.models.golden import read_golden
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer


def write_directory(directory: Path, golden: str = "llama") -> Path:
    """One of tests/models/goldens with the byte tokenizer and its chat template, and a generation config."""
    found = read_golden(golden)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(found.hf_config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "temperature": 0.7}))
    save_file(found.checkpoint.weights, directory / "model.safetensors")
    byte_tokenizer().backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE})
    )
    return directory


def parameters_of(model: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Every parameter as the engine would have it."""
    _, state = load_model(open_checkpoint(str(model)), jnp.dtype(dtype), progress=False)
    return {parameter_name(path): np.asarray(value.get_value()) for path, value in nnx.to_flat_state(state)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same parameters, bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].tobytes() == value.tobytes(), name
