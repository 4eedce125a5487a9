"""Forward passes, to be traced and lowered, and the page table that they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.engine.batch import unpack, vector_length
from jaxserve.engine.lattice import ForwardShape
from jaxserve.engine.packed_model import PackedModel
from jaxserve.engine.settle import Settings
from jaxserve.engine.spread import Spread
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.models.image_tokens import ImageTokens
from jaxserve.models.layers import take_rows

ASSIGN_CHUNK = 256  # pages of one assign call


class ForwardPrograms:
    """What reads the weights and writes KV pages."""

    def __init__(self, settings: Settings, packed: PackedModel, spread: Spread, backend: Backend) -> None:
        self._packed = packed
        self._spread = spread
        self._backend: Backend = backend
        model, layout = settings.model, settings.layout
        page = (settings.memory.num_pages, settings.page_size, layout.num_slots, 2, model.head_dim)
        kv_axes = ("pages", "page_tokens", "kv_heads", "key_value", "head_dim")
        self.kv_specs = (spread.spec(page, settings.kv_dtype, *kv_axes),) * model.num_layers
        self.page_table_spec = spread.spec((settings.max_num_seqs + 1, settings.lattice.max_pages), jnp.int32)
        # Models that see take one argument more, at the end: the tokens that images became.
        self.image_cache_specs: tuple[jax.ShapeDtypeStruct, ...] = ()
        if settings.tower is not None:
            rows = settings.tower.cache_rows + 1
            self.image_cache_specs = (spread.spec((rows, model.hidden_size), settings.dtype),)

    def forward(self, shape: ForwardShape) -> Callable[..., tuple[Any, ...]]:
        """A forward pass, to be traced."""

        def forward(weights, kv_pages, page_table, last_token, vector, step, *image_cache):
            batch = unpack(vector, step, shape, page_table, self._backend)
            token_ids = jnp.where(batch.token_ids >= 0, batch.token_ids, last_token[batch.slots])
            sampled = batch.sample_index if shape.kind == "mixed" and not shape.scores_prompts else None
            images = None if batch.images is None else ImageTokens(*batch.images, *image_cache)
            hidden, kv_pages = self._packed.model(weights)(token_ids, kv_pages, batch.meta, sampled, images)
            if shape.scores_prompts:
                return take_rows(hidden, batch.sample_index), hidden, kv_pages, batch.page_table
            return hidden, kv_pages, batch.page_table

        return forward

    def lower(self, shape: ForwardShape, last_token: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """`last_token` is of the sampler state, where tokens are that the host has not seen."""
        return self._spread.lower(
            self.forward(shape),
            self._packed.specs,
            self.kv_specs,
            self.page_table_spec,
            last_token,
            self._spread.spec((vector_length(shape),), jnp.int32),
            self._spread.spec((), jnp.int32),
            *self.image_cache_specs,
            donate=(1, 2),
            outs=(*[None] * (2 if shape.scores_prompts else 1), self.kv_specs, None),
        )

    def lower_assign(self) -> jax.stages.Lowered:
        """Pages written into the page table ahead of a step."""

        def assign(page_table, slots, places, pages):
            return page_table.at[slots, places].set(pages)

        numbers = self._spread.spec((ASSIGN_CHUNK,), jnp.int32)
        return self._spread.lower(assign, self.page_table_spec, numbers, numbers, numbers, donate=0)
