"""Which programs a model needs: its language model's, and the tower's of one that sees."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxserve.engine.programs import ProgramBook
from jaxserve.engine.settle import Settings
from jaxserve.engine.tower_programs import TowerBook
from jaxserve.models.towers import language_graph, split_tower, tower_graph


def make_books(settings: Settings, abstract: nnx.State) -> tuple[ProgramBook, TowerBook | None]:
    """From the whole model's abstract parameters (on_devices.abstract_on_devices)."""
    layout, dtype = settings.layout, jnp.dtype(settings.dtype)
    language, tower = split_tower(abstract)
    book = ProgramBook(settings, language_graph(layout, dtype), language)
    if tower is None:
        return book, None
    graph = tower_graph(layout, dtype)
    return book, TowerBook(settings, graph, tower, book.image_cache_specs[0])
