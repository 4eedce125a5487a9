"""What a converted checkpoint holds beside its weights: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import AnyCheckpoint
from jaxserve.loading.hf_export import hf_config_of, hf_generation_config_of
from jaxserve.loading.orbax_format import MANIFEST, ORBAX_MARKERS
from jaxserve.text.gguf_tokenizer import parts_from_gguf
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.text.tokenizer_files import tokenizer_files

_CONFIGS = ("config.json", "generation_config.json")
_LICENSES = ("LICENSE*", "NOTICE*")
_ALL = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja", *_LICENSES)


def text_files(checkpoint: AnyCheckpoint, tokenizer: Path) -> dict[str, bytes]:
    """The contents of these files by name, so that serving the checkpoint needs nothing else.

    `tokenizer` is a directory or a .gguf file, mostly the checkpoint itself.  What is in Hugging Face layout is taken
    as it is, the rest is written anew.  Raises CheckpointError for a tokenizer that cannot be used.
    """
    load_tokenizer(tokenizer)
    if checkpoint.path.is_dir():
        patterns = _ALL if checkpoint.path == tokenizer else (*_CONFIGS, *_LICENSES)
        files = _matching(checkpoint.path, patterns)
    else:
        files = {
            "config.json": _json(hf_config_of(checkpoint.config, str(checkpoint.path))),
            "generation_config.json": _json(hf_generation_config_of(checkpoint.defaults)),
        }
    if tokenizer.is_dir():
        return _matching(tokenizer, _ALL) | files
    from jaxserve.loading.gguf_file import read_gguf_header  # needs a package that other formats do without

    return files | tokenizer_files(parts_from_gguf(read_gguf_header(tokenizer).fields))


def _matching(directory: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    found = sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
    names = [str(path.relative_to(directory)) for path in found]
    return {
        name: _read(directory / name)
        for name in names
        if not name.endswith(".index.json") and name not in (MANIFEST, *ORBAX_MARKERS)
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()
