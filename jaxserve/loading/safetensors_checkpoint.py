"""A Hugging Face directory of safetensors files as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import GenerationDefaults, TensorInfo
from jaxserve.loading.hf_config import generation_defaults_from_hf, model_config_from_hf
from jaxserve.loading.hf_vision import published_name
from jaxserve.loading.json_file import read_json_object
from jaxserve.loading.safetensors_file import SafetensorsFile

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_hf_config(directory: Path) -> tuple[ModelConfig, GenerationDefaults]:
    """The model's numbers from config.json, and what generation_config.json (if there) says.

    Raises CheckpointError for a missing or broken config.json and for a quantised checkpoint.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no config.json; give a directory in Hugging Face layout or a .gguf file"
        )
    config = read_json_object(path)
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{path}: quantization_config says {method or quantization!r}; quantised safetensors cannot be "
            "served, use the original checkpoint or a GGUF file"
        )
    generation_path = directory / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else None
    return model_config_from_hf(config, str(path)), generation_defaults_from_hf(generation, config)


class SafetensorsCheckpoint:
    """An opened directory; implements jaxserve.loading.checkpoint.Checkpoint."""

    def __init__(self, directory: Path) -> None:
        """Check config.json and the header and size of every shard; no tensor data is touched."""
        self.path = directory
        self.config, self.defaults = read_hf_config(directory)
        self._place_of: dict[str, tuple[SafetensorsFile, str]] = {}  # the file, and the name there
        opened = _open_files(directory)
        self.files = [file.path for file in opened]  # that tensors are read from; others may lie beside them
        for file in opened:
            for stored in file.tensors:
                name = stored if self.config.vision is None else published_name(stored)
                if name in self._place_of:
                    both = f"{self._place_of[name][0].path.name} and {file.path.name}"
                    raise CheckpointError(f"{directory}: tensor {name!r} is in both {both}")
                self._place_of[name] = file, stored

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        infos = {name: file.tensors[stored] for name, (file, stored) in self._place_of.items()}
        return {name: TensorInfo(stored.shape, stored.dtype) for name, stored in infos.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored float type (float32 for F64), a view of the file.  Thread-safe."""
        file, stored = self._place_of[name]
        return file.read(stored)

    def release(self, name: str) -> None:
        """See Checkpoint.release."""
        file, stored = self._place_of[name]
        file.release(stored)


def _open_files(directory: Path) -> list[SafetensorsFile]:
    """The single file, or every shard the index names, each with the tensors that the index says."""
    if (directory / SINGLE_FILE).exists():
        return [SafetensorsFile(directory / SINGLE_FILE)]
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        raise CheckpointError(f"{directory}: {_what_is_there_instead(directory)}")
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: has no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{index_path}: tensor {name!r} is said to be in {shard!r}, which is no file name"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(shards)} files that {INDEX_FILE} names are missing: "
            f"{', '.join(missing[:5])}; fetch them again"
        )
    files = {shard: SafetensorsFile(directory / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise CheckpointError(
                f"{directory / shard}: holds no tensor {name!r}, which {INDEX_FILE} says it does"
            )
    return list(files.values())


def _what_is_there_instead(directory: Path) -> str:
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        return (
            f"has neither {SINGLE_FILE} nor {INDEX_FILE}, only {', '.join(shards[:5])}; "
            "a checkpoint in Hugging Face layout is needed"
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"holds its weights as pickles ({', '.join(pickles[:5])}), which are never loaded because they "
            "can run code; convert them to safetensors with save_pretrained() of transformers"
        )
    return (
        f"holds no weights ({SINGLE_FILE} or {INDEX_FILE}); to run with random ones use --load-format dummy, "
        'or load_format="dummy" in Python'
    )
