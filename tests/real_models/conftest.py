"""Engines over the two real models, small enough to compile quickly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM
from jaxserve.loading.fetch import FETCHABLE_MODELS, models_directory

# Few buckets, and the same for all: a model's programs are compiled once, then found in the disk cache.
_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
}


@pytest.fixture(scope="session")
def model_file() -> Callable[[str], Path]:
    """The GGUF file of a model by its short name; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = models_directory() / FETCHABLE_MODELS[name].file_name
        if not path.exists():
            pytest.skip(f"{path} is not there: `make models` fetches it")
        return path

    return find


@pytest.fixture(scope="session")
def open_llm() -> Callable[..., LLM]:
    """Loads a model into an engine, a float32 one unless told otherwise."""

    def load(model: Path, **options: Any) -> LLM:
        return LLM(str(model), **(_OPTIONS | options))

    return load
