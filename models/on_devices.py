"""Parameters over the devices of an engine: their shapes and shardings there, and random ones to measure with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding, SingleDeviceSharding

from jaxserve.models.layout import Layout, mesh_size
from jaxserve.models.parameters import DUMMY_STD, abstract_model, dummy_weights, parameter_name
from jaxserve.models.registry import build_model
from jaxserve.models.sharding import engine_mesh, partition_spec
from jaxserve.models.towers import spread_tower
from jaxserve.models.weight_table import ParameterPath

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


def abstract_on_devices(
    layout: Layout, dtype: jnp.dtype, devices: Sequence[Device] | None = None
) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """Graph of one device's part of a model, and its parameters over all of them: padded shapes, dtypes, shardings.

    Without `devices` there are no shardings: the default device, or a plan.
    """
    if devices is None or layout.num_devices == 1:
        sharding = None if devices is None else SingleDeviceSharding(devices[0])
        return _abstract(layout, dtype, lambda axes, name: sharding)
    return abstract_on_mesh(layout, dtype, engine_mesh(devices, layout.tensor, layout.expert))


def abstract_on_mesh(
    layout: Layout, dtype: jnp.dtype, mesh: Mesh | AbstractMesh
) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """The same for a mesh like sharding.engine_mesh's."""
    graphdef, abstract = _abstract(
        layout, dtype, lambda axes, name: NamedSharding(mesh, partition_spec(axes, name))
    )
    return graphdef, spread_tower(abstract)


def _abstract(
    layout: Layout, dtype: jnp.dtype, place: Callable[[Sequence[str], str], Sharding | None]
) -> tuple[nnx.GraphDef[Any], nnx.State]:
    graphdef, part = nnx.split(nnx.eval_shape(lambda: build_model(layout.local, dtype, layout.part)))

    def lay(path: ParameterPath, parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        axes = parameter.get_metadata("axes")
        shape = tuple(
            size * mesh_size(layout, axis) for axis, size in zip(axes, parameter.shape, strict=True)
        )
        sharding = place(axes, parameter_name(path))
        return parameter.replace(jax.ShapeDtypeStruct(shape, parameter.dtype, sharding=sharding))

    return graphdef, nnx.from_flat_state(
        [(path, lay(path, value)) for path, value in nnx.to_flat_state(part)]
    )


def dummy_on_devices(abstract: nnx.State, seed: int, layout: Layout) -> nnx.State:
    """What dummy_weights gives, with every number where the layout has it, made where it belongs.

    `abstract` is abstract_on_devices'.
    """
    parameters = nnx.to_flat_state(abstract)
    if all(parameter.get_value().sharding is None for _, parameter in parameters):
        return dummy_weights(abstract, seed)
    _, whole = abstract_model(layout.config, parameters[0][1].dtype)
    shapes = {path: parameter.shape for path, parameter in nnx.to_flat_state(whole)}
    key = jax.random.key(seed)

    def fill(path: ParameterPath, parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        spec = parameter.get_value()
        axes = tuple(parameter.get_metadata("axes"))
        is_scale = path[-1] == "scale"
        make = _filler(layout, axes, shapes[path], jnp.dtype(spec.dtype), spec.sharding, is_scale)
        return parameter.replace(make(jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))))

    return nnx.from_flat_state([(path, fill(path, value)) for path, value in parameters])


@cache
def _filler(
    layout: Layout,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: Sharding,
    is_scale: bool,
) -> Callable[[jax.Array], jax.Array]:
    """Makes parameters alike, each from a key of its own."""

    def make(key: jax.Array) -> jax.Array:
        value = jnp.ones(shape, dtype)
        if not is_scale:
            value = jax.random.normal(key, shape, dtype) * jnp.asarray(DUMMY_STD, dtype)
        padded = layout.padded_shape(axes, shape)
        if padded == shape:
            return value
        out = jnp.zeros(padded, dtype)
        for move in layout.moves(axes, shape):
            out = out.at[move.target].set(value[move.source])
        return out

    return jax.jit(make, out_shardings=sharding)
