"""The faces that checkpoints show: config and generation defaults, and tensors or the parameters themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from jaxserve.config import ModelConfig

if TYPE_CHECKING:
    import jax

    from jaxserve.models.layout import Move


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
    """An opened checkpoint of tensors under Hugging Face names, from which a weight table makes parameters.

    Opening checks headers and sizes of every file; reading happens tensor by tensor.
    """

    path: Path
    config: ModelConfig
    defaults: GenerationDefaults

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face orientation, float32 or its stored float type.  Thread-safe."""
        ...

    def release(self, name: str) -> None:
        """Say that the tensor is not needed soon: its part of a mapped file need not stay in memory."""
        ...


@runtime_checkable
class ParameterCheckpoint(Protocol):
    """An opened checkpoint that holds a model's parameters as they are.  Opening checks the size of every file."""

    path: Path
    config: ModelConfig
    defaults: GenerationDefaults

    @property
    def parameters(self) -> Mapping[str, TensorInfo]:
        """By dotted path: "layers.3.attention.qkv".  `stored_as` is the name of a numpy dtype."""
        ...

    def restore(
        self,
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        moves: Mapping[str, Sequence[Move]] | None = None,
        *,
        progress: bool,
    ) -> dict[str, jax.Array]:
        """The parameters of `wanted` in its dtypes and shardings; on the default device where it has none.

        `moves` say of parameters whose wanted shapes are not those stored which numbers go where; others are zero.
        """
        ...


AnyCheckpoint = Checkpoint | ParameterCheckpoint
