"""The parameters of an opened checkpoint one by one, and how each is to be stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import Dtype
from jaxserve.loading.checkpoint import Checkpoint
from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
from jaxserve.loading.orbax_format import ParameterLayout
from jaxserve.loading.weights import build_parameter, check_copies, check_parameters, check_tensors
from jaxserve.models.parameters import abstract_model, parameter_name
from jaxserve.models.registry import family_of
from jaxserve.models.weight_table import WeightRow

# Logical axes that a mesh may be laid over: along them parameters are cut, so that a device reads little but its own.
_CUT_AXES = ("expert", "vocab", "kv_heads", "heads", "ffn", "expert_ffn", "expert_gate_up")
_WAYS = 8
LEAST_CHUNK_BYTES = 1 << 20  # smaller files cost more to open than their bytes take to read
MOST_CHUNK_BYTES = 64 << 20  # a thread reads and writes one at a time

_STORED_AS = {"BF16": "bfloat16", "F16": "float16"}  # all else is read as float32
_PLAIN = {"F32", "BF16", "F16"}  # a tensor read is a view of the file
_MOST_PACKED_BYTES = 1.2  # that a quantised weight takes in the file


@dataclass(frozen=True, slots=True)
class ParameterSource:
    """A parameter that can be read."""

    name: str
    layout: ParameterLayout
    num_bytes_held: int  # that reading it takes, the parameter itself included
    read: Callable[[], np.ndarray]  # in any float type
    release: Callable[[], None]


def sources_of(checkpoint: Checkpoint | OrbaxCheckpoint, dtype: Dtype | None) -> list[ParameterSource]:
    """All parameters of a checkpoint's model, the largest first; dtype None keeps what the checkpoint has.

    Raises CheckpointError where the checkpoint's tensors are not exactly those of its model.
    """
    _, abstract = abstract_model(checkpoint.config, jnp.dtype(jnp.float32))
    axes = {parameter_name(path): _axes(parameter) for path, parameter in nnx.to_flat_state(abstract)}
    if isinstance(checkpoint, OrbaxCheckpoint):
        check_parameters(abstract, checkpoint)
        sources = [_stored_source(checkpoint, name, dtype, axes[name]) for name in axes]
    else:
        table = family_of(checkpoint.config).weights(checkpoint.config)
        check_tensors(table, checkpoint.tensors, str(checkpoint.path))
        check_copies(table, checkpoint.read, checkpoint.tensors, str(checkpoint.path))
        shapes = {path: parameter.shape for path, parameter in nnx.to_flat_state(abstract)}
        sources = [
            _built_source(checkpoint, row, shapes[row.parameter], dtype, axes[parameter_name(row.parameter)])
            for row in table.rows
        ]
    return sorted(sources, key=lambda source: -source.num_bytes_held)


def chunk_grid(shape: Sequence[int], axes: Sequence[str], itemsize: int) -> tuple[int, ...]:
    """In how many equal parts to cut a parameter along each axis, a power of two.

    The axis that a mesh is most likely laid over is cut first, as far as is worth a file each; what is still too large
    is cut on, there or along other such axes.
    """
    grid = [1] * len(shape)
    num_bytes = prod(shape) * itemsize
    cut = sorted((_CUT_AXES.index(axis), i) for i, axis in enumerate(axes) if axis in _CUT_AXES)
    for rank, (_, i) in enumerate(cut):
        while shape[i] % (2 * grid[i]) == 0:
            is_worth_it = rank == 0 and grid[i] < _WAYS and num_bytes >= 2 * LEAST_CHUNK_BYTES
            if not is_worth_it and num_bytes <= MOST_CHUNK_BYTES:
                break
            grid[i] *= 2
            num_bytes //= 2
    return tuple(grid)


def _built_source(
    checkpoint: Checkpoint, row: WeightRow, shape: Sequence[int], dtype: Dtype | None, axes: Sequence[str]
) -> ParameterSource:
    stored = {name: checkpoint.tensors[name].stored_as for name in row.sources}
    kinds = {name: _STORED_AS.get(kind, "float32") for name, kind in stored.items()}
    several = len(set(kinds.values())) > 1
    built = "float32" if several else next(iter(kinds.values()))  # float32 holds the others exactly
    layout = _layout(shape, dtype or built, axes)
    held = 0
    for name, size in row.sources.items():
        held += prod(size) * jnp.dtype(kinds[name]).itemsize
        if stored[name] not in _PLAIN:
            held += int(prod(size) * _MOST_PACKED_BYTES)
    if len(row.sources) > 1:  # of one tensor alone it is a view
        held += prod(shape) * jnp.dtype(built).itemsize

    def read_tensor(name: str) -> np.ndarray:
        tensor = checkpoint.read(name)
        if stored[name] not in _PLAIN:
            checkpoint.release(name)
        return tensor

    def release() -> None:
        for name in row.sources:
            checkpoint.release(name)

    name = parameter_name(row.parameter)
    return ParameterSource(name, layout, held, partial(build_parameter, row, read_tensor), release)


def _stored_source(
    checkpoint: OrbaxCheckpoint, name: str, dtype: Dtype | None, axes: Sequence[str]
) -> ParameterSource:
    stored = checkpoint.layouts[name]
    layout = _layout(stored.shape, dtype or stored.dtype, axes)
    return ParameterSource(name, layout, stored.num_bytes, partial(checkpoint.read, name), lambda: None)


def _layout(shape: Sequence[int], dtype: str, axes: Sequence[str]) -> ParameterLayout:
    return ParameterLayout(tuple(shape), dtype, chunk_grid(shape, axes, jnp.dtype(dtype).itemsize))


def _axes(parameter: nnx.Variable[Any]) -> tuple[str, ...]:
    return parameter.get_metadata("axes")
