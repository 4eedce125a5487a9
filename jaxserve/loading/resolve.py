"""From what a user calls a model (path, hub name, short name) to an opened checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.config import LoadFormat, ModelConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading.checkpoint import Checkpoint, GenerationDefaults
from jaxserve.loading.fetch import FETCHABLE_MODELS, fetch_model
from jaxserve.loading.hub import download_from_hub, is_hub_name
from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
from jaxserve.loading.orbax_format import MANIFEST, ORBAX_MARKERS, is_converted, is_unfinished
from jaxserve.loading.safetensors_checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsCheckpoint,
    read_hf_config,
)

if TYPE_CHECKING:
    from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def open_checkpoint(
    model: str, load_format: LoadFormat = "auto", revision: str | None = None
) -> Checkpoint | OrbaxCheckpoint:
    """Find the model, download it if need be, and open it with every header and file size checked.

    `model` is a directory in Hugging Face layout, one that `jaxserve convert` wrote, a directory with one .gguf file, a
    .gguf file, OWNER/NAME on the hub, or a short name of jaxserve.loading.fetch; `revision` is of one on the hub.  The
    format "dummy" has no checkpoint to open: see open_config.  Raises CheckpointError, naming what was looked for.
    """
    if load_format == "dummy":
        raise ConfigError(
            "load_format='dummy': there is no checkpoint to open; use auto, safetensors, gguf or orbax"
        )
    path = _find(model, revision, with_weights=True)
    if load_format == "orbax" or (load_format == "auto" and _is_orbax_directory(path)):
        return _open_orbax(path)
    if path.is_dir() and _is_safetensors_directory(path, load_format):
        return SafetensorsCheckpoint(path)
    if load_format == "safetensors":
        raise CheckpointError(
            f"{path}: load_format='safetensors', but this is not a directory in Hugging Face layout"
        )
    return _open_gguf(path)


def open_config(model: str, revision: str | None = None) -> tuple[ModelConfig, GenerationDefaults, Path]:
    """The model's numbers without its weights: a directory that holds nothing but config.json will do.

    The path is the directory or the .gguf file, where a tokenizer may be found too.
    """
    path = _find(model, revision, with_weights=False)
    if is_converted(path):
        converted = OrbaxCheckpoint(path)
        return converted.config, converted.defaults, path
    if path.is_dir() and (path / "config.json").exists():
        return *read_hf_config(path), path
    checkpoint = _open_gguf(path)
    return checkpoint.config, checkpoint.defaults, checkpoint.path


def locate_tokenizer(name: str) -> Path:
    """The directory or .gguf file with the tokenizer of `name`, which is anything open_checkpoint takes.

    From the hub it brings the tokenizer's files without the weights.
    """
    path = _find(name, None, with_weights=False)
    if (
        path.is_dir()
        and not any((path / file).exists() for file in _TOKENIZER_FILES)
        and any(path.glob("*.gguf"))
    ):
        return _gguf_file(path)
    return path


def _find(model: str, revision: str | None, *, with_weights: bool) -> Path:
    path = Path(model).expanduser()
    is_on_hub = not path.exists() and model not in FETCHABLE_MODELS and is_hub_name(model)
    if revision is not None and not is_on_hub:
        raise ConfigError(
            f"revision={revision!r}: {model} is not a model on the hub (OWNER/NAME); leave it out"
        )
    if is_unfinished(path):
        raise CheckpointError(
            f"{path}: holds a conversion that is not finished; run the same `jaxserve convert` again to go on with it"
        )
    if path.exists():
        return path
    if model in FETCHABLE_MODELS:
        return fetch_model(model)
    if model.endswith(".gguf"):
        raise CheckpointError(f"{model}: no such file")
    if is_hub_name(model):
        return download_from_hub(model, with_weights=with_weights, revision=revision)
    raise CheckpointError(
        f"{model}: no such path, and neither a hub name (OWNER/NAME) nor one of the short names "
        f"{', '.join(FETCHABLE_MODELS)}"
    )


def _is_orbax_directory(path: Path) -> bool:
    """Whether to read a path as a converted checkpoint; one that Orbax alone would read too, to say what it lacks."""
    return is_converted(path) or (
        any((path / marker).exists() for marker in ORBAX_MARKERS) and not _has_safetensors(path)
    )


def _open_orbax(path: Path) -> OrbaxCheckpoint:
    if not is_converted(path):
        raise CheckpointError(
            f"{path}: has no {MANIFEST}; only Orbax checkpoints that `jaxserve convert` wrote can be served, and they "
            "have one"
        )
    return OrbaxCheckpoint(path)


def _is_safetensors_directory(directory: Path, load_format: LoadFormat) -> bool:
    """Whether to read a directory as safetensors; one without any weights too, for that error says most."""
    if load_format != "auto":
        return load_format == "safetensors"
    return _has_safetensors(directory) or not any(directory.glob("*.gguf"))


def _has_safetensors(directory: Path) -> bool:
    return (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists()


def _open_gguf(path: Path) -> GGUFCheckpoint:
    # Needs a package that other formats do without.
    from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint

    return GGUFCheckpoint(_gguf_file(path))


def _gguf_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: neither a directory nor a .gguf file")
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if not files:
        nothing_else = "" if (path / "config.json").exists() else " and no config.json"
        raise CheckpointError(f"{path}: holds no .gguf file{nothing_else}")
    raise CheckpointError(
        f"{path}: holds {len(files)} .gguf files; give one of them: {', '.join(f.name for f in files)}"
    )
