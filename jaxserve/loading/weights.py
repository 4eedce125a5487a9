"""Fills a model's parameters from a checkpoint, by the weight table of its family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.errors import CheckpointError
from jaxserve.loading.boxes import plan_shards
from jaxserve.loading.checkpoint import AnyCheckpoint, ParameterCheckpoint
from jaxserve.models.layout import Layout, Move
from jaxserve.models.parameters import abstract_model, parameter_name
from jaxserve.models.registry import family_of
from jaxserve.models.weight_table import ParameterPath, WeightRow, WeightTable
from jaxserve.progress import progress_bar

# Reading, dequantising and copying leave the GIL most of the time; each holds one parameter's bytes.
_NUM_THREADS = 4
_NAMES_SHOWN = 8


class HasShape(Protocol):
    """As much of a checkpoint tensor's description as is checked here."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def load_model(
    checkpoint: AnyCheckpoint, dtype: jnp.dtype, *, progress: bool = True
) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """A checkpoint's model on the default device, as nnx.merge takes it.

    Raises CheckpointError where the checkpoint's tensors are not exactly those of its model.
    """
    graphdef, abstract = abstract_model(checkpoint.config, dtype)
    return graphdef, load_state(checkpoint, abstract, progress=progress)


def load_state(
    checkpoint: AnyCheckpoint, abstract: nnx.State, layout: Layout | None = None, *, progress: bool = True
) -> nnx.State:
    """A checkpoint's parameters in the dtypes and shardings of `abstract`; on the default device where it has none.

    `layout` says where the checkpoint's numbers stand in arrays of `abstract` that are not as it has them.
    Raises CheckpointError where the checkpoint's tensors are not exactly those of its model.
    """
    specs = {path: _spec(parameter) for path, parameter in nnx.to_flat_state(abstract)}
    stored, moves = abstract, {}
    if layout is not None:
        stored = _with_dtypes(abstract_model(layout.config, jnp.dtype(jnp.float32))[1], specs)
        moves = {
            path: layout.moves(parameter.get_metadata("axes"), parameter.shape)
            for path, parameter in nnx.to_flat_state(stored)
        }
    if isinstance(checkpoint, ParameterCheckpoint):
        return _restore(checkpoint, stored, specs, moves, progress=progress)
    return load_weights(
        stored,
        family_of(checkpoint.config).weights(checkpoint.config),
        checkpoint.read,
        checkpoint.tensors,
        where=str(checkpoint.path),
        place=lambda path, value: _laid_out(value, specs[path], moves.get(path)),
        progress=progress,
    )


def load_weights(
    abstract: nnx.State,
    table: WeightTable,
    read: Callable[[str], np.ndarray],
    tensors: Mapping[str, HasShape],
    *,
    where: str,
    place: Callable[[ParameterPath, np.ndarray], jax.Array] | None = None,
    progress: bool = True,
) -> nnx.State:
    """The state with every parameter read, laid out and placed; its dtypes are those of `abstract`.

    `read` gives a tensor of `tensors` in Hugging Face orientation and is called from several threads, as is
    `place`, which gets each parameter in its final dtype (not always contiguous), and puts it in place: by default
    into the sharding that it has in `abstract`, or on the default device.
    `where` names the checkpoint in errors; `progress` shows a bar on stderr.  Raises CheckpointError before
    the first read if a tensor is missing, left over or of another shape than the table says.
    """
    parameters: dict[ParameterPath, nnx.Variable[Any]] = dict(nnx.to_flat_state(abstract))
    _check_table(table, parameters)
    check_tensors(table, tensors, where)

    def fill(row: WeightRow) -> tuple[ParameterPath, nnx.Variable[Any]]:
        parameter = parameters[row.parameter]
        # Narrowed one by one: a layer's experts are hundreds of tensors, which some files give four bytes a number.
        value = build_parameter(row, lambda name: read(name).astype(parameter.dtype, copy=False))
        assert value.shape == parameter.shape, f"{row.parameter}: {value.shape} built for {parameter.shape}"
        # Transposed by the strides alone, which the transfer is much faster at making good than numpy.
        array = place(row.parameter, value) if place is not None else _laid_out(value, _spec(parameter))
        return row.parameter, parameter.replace(array)

    filled = {}
    total = sum(_num_bytes(parameter) for parameter in parameters.values())
    # The largest first, so that no thread is left alone with one at the end.
    rows = sorted(table.rows, key=lambda row: -_num_bytes(parameters[row.parameter]))
    bar = progress_bar(total, "Loading weights", "B", enabled=progress)
    with bar, ThreadPoolExecutor(_NUM_THREADS, "weights") as pool:
        try:
            for future in as_completed([pool.submit(fill, row) for row in rows]):
                path, parameter = future.result()
                filled[path] = parameter
                bar.update(_num_bytes(parameters[path]))  # where it is padded, without that
            check_copies(table, read, tensors, where)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return nnx.from_flat_state(filled)


def build_parameter(row: WeightRow, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """A parameter made of the tensors it comes from; float32 where their float types differ."""
    tensors = [read(name) for name in row.sources]
    if len({tensor.dtype for tensor in tensors}) > 1:  # numpy has no common type for bfloat16 and float16
        tensors = [tensor.astype(np.float32, copy=False) for tensor in tensors]
    return row.build(*tensors)


def check_tensors(table: WeightTable, tensors: Mapping[str, HasShape], where: str) -> None:
    """Raise CheckpointError unless `tensors` are exactly what the table reads, shapes included."""
    wanted = {name: shape for row in table.rows for name, shape in row.sources.items()}
    copies = {name: wanted[original] for name, original in table.copies.items() if name in tensors}
    missing = [name for name in wanted if name not in tensors]
    left_over = [
        name
        for name in tensors
        if name not in wanted and name not in copies and not table.ignored.fullmatch(name)
    ]
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in (wanted | copies).items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    _refuse(missing, left_over, misshapen, where)


def check_parameters(abstract: nnx.State, checkpoint: ParameterCheckpoint) -> None:
    """Raise CheckpointError unless a checkpoint's parameters are exactly those of the model, shapes included."""
    shapes = {parameter_name(path): parameter.shape for path, parameter in nnx.to_flat_state(abstract)}
    stored = checkpoint.parameters
    _refuse(
        [name for name in shapes if name not in stored],
        [name for name in stored if name not in shapes],
        [
            f"{name} is {list(stored[name].shape)}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
        str(checkpoint.path),
    )


def check_copies(
    table: WeightTable, read: Callable[[str], np.ndarray], tensors: Collection[str], where: str
) -> None:
    """Raise CheckpointError for a tensor that the table takes for a copy of another and that differs from it."""
    for name, original in table.copies.items():
        if name in tensors and not np.array_equal(read(name), read(original)):
            raise CheckpointError(
                f"{where}: the config ties {name} to {original}, but the checkpoint holds both and they "
                "differ; if they are meant to, set tie_word_embeddings to false in config.json"
            )


def _check_table(table: WeightTable, parameters: Mapping[ParameterPath, Any]) -> None:
    """The table and the model are both ours, so a difference is a bug here and not the checkpoint's fault."""
    paths = [row.parameter for row in table.rows]
    assert len(paths) == len(set(paths)), "a parameter has two rows in the weight table"
    assert set(paths) == set(parameters), f"table and model differ in {set(paths) ^ set(parameters)}"


def _restore(
    checkpoint: ParameterCheckpoint,
    stored: nnx.State,
    specs: Mapping[ParameterPath, jax.ShapeDtypeStruct],
    moves: Mapping[ParameterPath, Sequence[Move]],
    *,
    progress: bool,
) -> nnx.State:
    check_parameters(stored, checkpoint)
    arrays = checkpoint.restore(
        {parameter_name(path): spec for path, spec in specs.items()},
        {parameter_name(path): found for path, found in moves.items()},
        progress=progress,
    )
    return nnx.from_flat_state(
        [
            (path, parameter.replace(arrays[parameter_name(path)]))
            for path, parameter in nnx.to_flat_state(stored)
        ]
    )


def _with_dtypes(abstract: nnx.State, specs: Mapping[ParameterPath, jax.ShapeDtypeStruct]) -> nnx.State:
    """The same shapes, in the dtypes of `specs`."""
    return nnx.from_flat_state(
        [
            (path, parameter.replace(jax.ShapeDtypeStruct(parameter.shape, specs[path].dtype)))
            for path, parameter in nnx.to_flat_state(abstract)
        ]
    )


def _refuse(missing: list[str], left_over: list[str], misshapen: list[str], where: str) -> None:
    """Raise CheckpointError if there is anything in one of the lists."""
    problems = [
        f"{what} ({len(names)}): {_first(names)}"
        for what, names in (
            ("tensors that the model needs are missing", missing),
            ("tensors that the model has no place for", left_over),
            ("tensors of a shape that contradicts the config", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit its own config: " + "; ".join(problems))


def _spec(parameter: nnx.Variable[Any]) -> jax.ShapeDtypeStruct:
    """The abstract array that an abstract state's parameter stands for."""
    return parameter.get_value()


def _laid_out(
    value: np.ndarray, wanted: jax.ShapeDtypeStruct, moves: Sequence[Move] | None = None
) -> jax.Array:
    """Put a parameter on its devices.  A copy even on CPU: `value` may be a view of a mapped file."""
    if wanted.sharding is None and moves is None:
        return jnp.array(value)
    on_cpu = jax.default_backend() == "cpu"
    shards = []
    for plan in plan_shards(wanted, moves):
        if len(plan.pieces) == 1 and plan.is_covered:
            shard = value[plan.pieces[0].source]
        else:
            shard = np.zeros(plan.shape, wanted.dtype)
            for piece in plan.pieces:
                shard[piece.target] = value[piece.source]
        shards += [jax.device_put(np.array(shard) if on_cpu else shard, target) for target in plan.targets]
    if wanted.sharding is None:
        return shards[0]
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, shards)


def _num_bytes(parameter: nnx.Variable[Any]) -> int:
    return int(np.prod(parameter.shape)) * np.dtype(parameter.dtype).itemsize


def _first(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f", and {rest} more" if rest > 0 else "")
