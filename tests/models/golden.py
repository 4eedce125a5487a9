"""Golden models (see make_goldens.py) and random ones as checkpoints, and a model run over one sequence."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import ModelConfig
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.loading.checkpoint import GenerationDefaults, TensorInfo
from jaxserve.loading.hf_config import model_config_from_hf
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.registry import family_of
from tests.quick_compile import QUICK

DIRECTORY = Path(__file__).with_name("goldens")
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.npz"))
PAGE_SIZE = 8


@dataclass
class MemoryCheckpoint:
    """A checkpoint that lives in a dict; implements jaxserve.loading.checkpoint.Checkpoint."""

    config: ModelConfig
    weights: dict[str, np.ndarray]
    path: Path = Path("in memory")
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(value.shape, "F16") for name, value in self.weights.items()}

    def read(self, name: str) -> np.ndarray:
        return self.weights[name]

    def release(self, name: str) -> None:
        """Nothing is mapped here."""


@dataclass(frozen=True)
class Golden:
    """What make_goldens.py wrote for one case."""

    hf_config: dict[str, Any]
    checkpoint: MemoryCheckpoint
    token_ids: np.ndarray  # [T] int32
    logits: np.ndarray  # [T, V] float32, by transformers


def read_golden(name: str) -> Golden:
    with np.load(DIRECTORY / f"{name}.npz") as arrays:
        hf_config = json.loads(str(arrays["config"]))
        prefix = "weight:"
        weights = {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
        config = model_config_from_hf(hf_config, name)
        return Golden(hf_config, MemoryCheckpoint(config, weights), arrays["token_ids"], arrays["logits"])


def random_checkpoint(name: str, config: ModelConfig) -> MemoryCheckpoint:
    """A model under the names of published checkpoints, the same wherever it is made; float16 holds its weights."""
    sources = {
        key: shape for row in family_of(config).weights(config).rows for key, shape in row.sources.items()
    }
    return MemoryCheckpoint(config, {key: _weight(name, key, shape) for key, shape in sources.items()})


def run_sequence(
    model: DecoderModel, token_ids: np.ndarray, chunks: Sequence[int], dtype: jnp.dtype
) -> jax.Array:
    """Logits [T, V] of one sequence run in steps of the given sizes; a step of one token is a decode step."""
    assert sum(chunks) == len(token_ids)
    config = model.config
    num_pages = -(-len(token_ids) // PAGE_SIZE)
    # Pages in falling order, so that a mix-up of logical and physical pages shows; page 0 is the dummy page.
    page_table = jnp.arange(num_pages, 0, -1, dtype=jnp.int32)[None]
    pages = tuple(
        jnp.zeros((num_pages + 1, PAGE_SIZE, config.num_kv_heads, 2, config.head_dim), dtype)
        for _ in range(config.num_layers)
    )
    graphdef, state = nnx.split(model)

    @partial(jax.jit, compiler_options=QUICK)
    def step(state: Any, token_ids: jax.Array, pages: tuple[jax.Array, ...], meta: AttentionMetadata) -> Any:
        model = nnx.merge(graphdef, state)
        hidden, pages = model(token_ids, pages, meta)
        return model.logits(hidden), pages

    logits, start = [], 0
    for size in chunks:
        meta = _metadata(page_table, start, size)
        step_logits, pages = step(state, jnp.asarray(token_ids[start : start + size]), pages, meta)
        logits.append(step_logits)
        start += size
    return jnp.concatenate(logits)


def _weight(model: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Large enough that every part shows in the logits."""
    noise = np.random.RandomState(zlib.crc32(f"{model}/{name}".encode())).standard_normal(shape)
    if name.endswith("bias"):
        value = 0.3 * noise
    elif len(shape) == 1:
        value = 1 + 0.3 * noise
    else:
        value = noise * (1.2 / np.prod(shape[1:]) ** 0.5)
    return value.astype(np.float16).astype(np.float32)


def _metadata(page_table: jax.Array, start: int, size: int) -> AttentionMetadata:
    tile_size = 16
    tile_starts = jnp.arange(0, size, tile_size, dtype=jnp.int32)
    return AttentionMetadata(
        positions=jnp.arange(start, start + size, dtype=jnp.int32),
        token_rows=jnp.zeros(size, jnp.int32),
        page_table=page_table,
        kv_lens=jnp.array([start + size], jnp.int32),
        query_starts=jnp.array([0, size], jnp.int32),
        tile_rows=jnp.zeros_like(tile_starts),
        tile_starts=tile_starts,
        num_tiles=jnp.int32(len(tile_starts)),
        kind="decode" if size == 1 else "mixed",
        tile_size=tile_size,
    )
