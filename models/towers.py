"""A model that sees, taken apart: the engine runs its language model and its tower in programs of their own."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxserve.models.layout import Layout
from jaxserve.models.registry import build_language_model
from jaxserve.models.vision_tower import VisionTower

_TOWER = "visual"  # where the tower stands in a model


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
