"""How long a converted checkpoint takes to load, beside how long its bytes take to read.

    python -m benchmarks.load                     # 1 GB of weights with Llama's dimensions
    python -m benchmarks.load --size 16G          # Llama-3.1-8B
    python -m benchmarks.load --checkpoint DST    # one that `jaxserve convert` wrote

Each round measures, one after the other and over the same files:

    read     every file, by as many threads as load it, into buffers that are used again
    keep     the same into new memory: what a program pays that wants the bytes on the host
    put      the same number of bytes from one place in memory to the device
    load     what a server does: every byte read, checked and brought to the device

first with the files dropped from the system's cache before each ("cold", on Linux), then from the cache ("warm").
What cold and warm mean on a virtual machine is up to its host, too.  Dummy weights are written by the conversion
itself, and removed afterwards.  Needs jax, flax, tokenizers, tqdm and numpy; no server packages and no network.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxserve.cli.quantities import num_bytes, positive
from jaxserve.config import ModelConfig
from jaxserve.conversion.convert import write_checkpoint
from jaxserve.loading.checkpoint import GenerationDefaults, TensorInfo
from jaxserve.loading.hf_config import model_config_from_hf
from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
from jaxserve.loading.orbax_restore import num_threads
from jaxserve.loading.weights import load_model
from jaxserve.models.registry import family_of

CAN_ADVISE = hasattr(os, "posix_fadvise")  # not on macOS
_BLOCK = 4 << 20
_PUT_BYTES = 64 << 20
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 0,
}
_SMALL = _LLAMA | {  # Llama-3.2-1B
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_LARGE = _LLAMA | {  # Llama-3.1-8B
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
_SMALL_UP_TO = 6 << 30


@dataclass
class DummyCheckpoint:
    """A Llama of random bfloat16 tensors; implements jaxserve.loading.checkpoint.Checkpoint."""

    config: ModelConfig
    path: Path = Path("dummy")
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(0).standard_normal(1 << 24).astype(ml_dtypes.bfloat16)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        rows = family_of(self.config).weights(self.config).rows
        return {name: TensorInfo(shape, "BF16") for row in rows for name, shape in row.sources.items()}

    def read(self, name: str) -> np.ndarray:
        shape = self.tensors[name].shape
        start = zlib.crc32(name.encode()) % 1000
        return np.resize(self._random[start:], shape)

    def release(self, name: str) -> None:
        """Nothing is mapped here."""


def hf_config(size: int) -> dict[str, Any]:
    """A config.json with as many layers as bring the weights to about `size` bytes."""

    def bytes_of(num_layers: int) -> int:
        config = model_config_from_hf(shape | {"num_hidden_layers": num_layers}, "dummy")
        rows = family_of(config).weights(config).rows
        return 2 * sum(prod(source) for row in rows for source in row.sources.values())

    shape = _SMALL if size <= _SMALL_UP_TO else _LARGE
    per_layer = bytes_of(2) - bytes_of(1)
    return shape | {"num_hidden_layers": max(1, round((size - bytes_of(1)) / per_layer) + 1)}


def files_of(directory: Path) -> list[Path]:
    """Every file, the largest first."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def drop_from_cache(files: list[Path]) -> None:
    """Ask the system to forget what the files hold."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(files: list[Path], *, keep: bool) -> None:
    """Read every file with as many threads as loading uses."""

    def read(path: Path) -> np.ndarray | None:
        size = path.stat().st_size
        out = np.empty(size, np.uint8) if keep else None
        with path.open("rb", buffering=0) as file:
            if CAN_ADVISE:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            for start in range(0, size, _BLOCK):
                block = min(_BLOCK, size - start)
                target = buffers.pop() if out is None else out[start : start + block].data
                filled = 0
                while filled < block:
                    filled += file.readinto(target[filled:block])
                if out is None:
                    buffers.append(target)
        return out

    buffers = [
        memoryview(bytearray(_BLOCK)) for _ in range(num_threads())
    ]  # a list's pop and append are atomic
    with ThreadPoolExecutor(num_threads()) as pool:
        kept = list(pool.map(read, files))
    del kept


def put_all(total: int, values: np.ndarray) -> None:
    """Bring so many bytes to the device, always the same ones, with as many threads as loading uses."""

    def put(_: int) -> jax.Array:
        return jax.block_until_ready(jax.device_put(values))

    with ThreadPoolExecutor(num_threads()) as pool:
        arrays = list(pool.map(put, range(total // values.nbytes)))
    del arrays


def load(directory: Path, dtype: jnp.dtype) -> None:
    """Open and load the model, as the engine does it."""
    _, state = load_model(OrbaxCheckpoint(directory), dtype, progress=False)
    jax.block_until_ready(state)


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(directory: Path, dtype: jnp.dtype, repeats: int) -> dict[str, Any]:
    """Seconds of everything, by "cold" and "warm", and the ratios of the medians."""
    files = files_of(directory)
    total = sum(path.stat().st_size for path in files)
    values = np.random.default_rng(0).integers(0, 255, _PUT_BYTES, np.uint8)
    put_all(_PUT_BYTES, values)  # wakes the device up
    actions = {
        "read": partial(read_all, files, keep=False),
        "keep": partial(read_all, files, keep=True),
        "put": partial(put_all, total, values),
        "load": partial(load, directory, dtype),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(repeats):
        for state in ("cold", "warm") if CAN_ADVISE else ("warm",):
            for name, action in actions.items():
                if state == "cold":
                    drop_from_cache(files)
                taken = seconds(action)
                found.setdefault(state, {}).setdefault(name, []).append(taken)
                print(f"{state} {name}: {taken:.2f} s, {total / taken / 1e9:.2f} GB/s", file=sys.stderr)
    medians = {
        state: {name: statistics.median(times) for name, times in by_name.items()}
        for state, by_name in found.items()
    }
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "num_files": len(files),
        "num_bytes": total,
        "num_threads": num_threads(),
        "seconds": found,
        "load_over": {
            state: {name: times["load"] / times[name] for name in ("read", "keep", "put")}
            for state, times in medians.items()
        },
    }


def main() -> int:
    """Write dummy weights if need be, measure, print the ratios."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", type=num_bytes, default=1 << 30, help="of the dummy weights, about (default: 1G)")
    add("--checkpoint", type=Path, metavar="DST", help="measure this converted checkpoint instead")
    add("--folder", type=Path, help="where to write the dummy weights (default: a temporary folder)")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="to load as")
    add("--repeats", type=positive, default=3, help="rounds (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.json", help="write the result here")
    args = parser.parse_args()
    folder = None
    directory = args.checkpoint
    try:
        if directory is None:
            folder = Path(tempfile.mkdtemp(prefix="jaxserve-load-", dir=args.folder))
            directory = folder / "converted"
            config = hf_config(args.size)
            checkpoint = DummyCheckpoint(model_config_from_hf(config, "dummy"))
            texts = {"config.json": json.dumps(config).encode()}
            taken = seconds(lambda: write_checkpoint(checkpoint, texts, directory))
            print(f"written in {taken:.1f} s", file=sys.stderr)
        result = measure(directory, jnp.dtype(args.dtype), args.repeats)
    finally:
        if folder is not None:
            shutil.rmtree(folder)
    for state, ratios in result["load_over"].items():
        told = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in ratios.items())
        print(f"{state}: load takes {told}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
