"""The face every kind of checkpoint shows: config, generation defaults, tensors under Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxserve.config import ModelConfig


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape (in Hugging Face orientation, a linear layer is [out, in]) and what it is stored as."""

    shape: tuple[int, ...]
    stored_as: str  # "F32", "BF16", "Q4_K", …


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json (or GGUF metadata) says; None where it is silent."""

    eos_token_ids: tuple[int, ...] = ()
    # temperature, top_p, top_k, min_p, repetition_penalty, max_tokens
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens_limit: int | None = None  # the operator's: no answer of a server gets longer


class Checkpoint(Protocol):
    """An opened checkpoint.  Opening checks headers and sizes of every file; reading happens tensor by tensor."""

    path: Path
    config: ModelConfig
    defaults: GenerationDefaults

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face orientation, float32 or its stored float type.  Thread-safe."""
        ...
