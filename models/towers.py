"""A model that sees, taken apart: the engine runs its language model and its tower in programs of their own."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.models.layout import Layout
from jaxserve.models.registry import build_language_model
from jaxserve.models.sharding import MODEL_AXES
from jaxserve.models.vision_tower import VisionTower

_TOWER = "visual"  # where the tower stands in a model
# Dimensions that several devices share where they divide evenly; XLA adds up what each has made.
_SHARED = ("vision_heads", "vision_attended", "vision_ffn", "vision_merger_ffn")


def split_tower(state: nnx.State) -> tuple[nnx.State, nnx.State | None]:
    """The language model's parameters and the tower's, of a whole model's, abstract or not."""
    flat = nnx.to_flat_state(state)
    language = [(path, value) for path, value in flat if path[0] != _TOWER]
    tower = [(path[1:], value) for path, value in flat if path[0] == _TOWER]
    return nnx.from_flat_state(language), nnx.from_flat_state(tower) if tower else None


def language_graph(layout: Layout, dtype: jnp.dtype) -> nnx.GraphDef[Any]:
    """The graph that goes with the language model's parameters, of one device's part."""
    return nnx.split(nnx.eval_shape(lambda: build_language_model(layout.local, dtype, layout.part)))[0]


def tower_graph(layout: Layout, dtype: jnp.dtype) -> nnx.GraphDef[VisionTower]:
    """The graph that goes with the tower's parameters."""
    config, vision = layout.config, layout.config.vision
    assert vision is not None
    return nnx.split(nnx.eval_shape(lambda: VisionTower(vision, config.hidden_size, dtype)))[0]


def spread_tower(state: nnx.State) -> nnx.State:
    """A model's abstract parameters on a mesh, the tower's over all of its devices instead of whole on each.

    Towers are not cut like language models: their programs are no shard_map, since padded heads and feed-forwards would
    gain little where images are few.
    """

    def spread(parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        whole = parameter.get_value()
        mesh = whole.sharding.mesh
        axes = tuple(axis for axis in MODEL_AXES if mesh.shape[axis] > 1)
        count = prod(mesh.shape[axis] for axis in axes)
        spec = [
            axes if name in _SHARED and size % count == 0 else None
            for name, size in zip(parameter.get_metadata("axes"), whole.shape, strict=True)
        ]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return parameter.replace(jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding))

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(path, spread(value) if path[0] == _TOWER else value) for path, value in flat]
    )
