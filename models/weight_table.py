"""What a weight table is: which checkpoint tensors make each parameter, and which may be left unread."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ParameterPath = tuple[Any, ...]  # str and int: ("layers", 3, "attention", "qkv"), as flax numbers nnx.List


@dataclass(frozen=True, slots=True)
class WeightRow:
    """One parameter and where it comes from."""

    parameter: ParameterPath
    sources: Mapping[
        str, tuple[int, ...]
    ]  # checkpoint tensor names, in the order of build's arguments, and shapes
    build: Callable[..., np.ndarray]  # pure numpy: tensors in Hugging Face orientation in, the parameter out


@dataclass(frozen=True, slots=True)
class WeightTable:
    """All parameters of a model.  Whatever else a checkpoint holds is an error, save for two exceptions."""

    rows: tuple[WeightRow, ...]
    ignored: re.Pattern[str] = re.compile(r"(?!)")  # names of tensors that are no weights
    # tensor that may be there -> the one it must equal
    copies: Mapping[str, str] = field(default_factory=dict)
