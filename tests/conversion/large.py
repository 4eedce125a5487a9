"""Converts a model of many layers, and tells how much memory that took."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxserve.conversion.convert import write_checkpoint
from jaxserve.loading.hf_config import model_config_from_hf
from jaxserve.loading.safetensors_checkpoint import SafetensorsCheckpoint
from jaxserve.models.registry import family_of
from tests.loading.builders import HF_CONFIG

NUM_LAYERS = 10
LARGE = HF_CONFIG | {"num_hidden_layers": NUM_LAYERS, "intermediate_size": 4096, "vocab_size": 1000}


def convert_large(directory: Path) -> int:
    """Bytes by which the resident memory has been larger than before the conversion, pages of files included."""
    source = directory / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(LARGE))
    _write_weights(source)
    checkpoint = SafetensorsCheckpoint(source)
    texts = {"config.json": (source / "config.json").read_bytes()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = _peak_memory()
    write_checkpoint(checkpoint, texts, directory / "converted", progress=False)
    return _peak_memory() - before


def _write_weights(source: Path) -> None:
    config = model_config_from_hf(LARGE, "large")
    rows = family_of(config).weights(config).rows
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32) for row in rows for name, shape in row.sources.items()
    }
    save_file(tensors, source / "model.safetensors")


def _peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
