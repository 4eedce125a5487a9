"""A device's part of a model: what its modules have to know about the others, inside shard_map."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.models.sharding import EXPERT, MODEL_AXES


@dataclass(frozen=True, slots=True)
class Part:
    """One of `num_devices` equal parts.  The whole model is one of one, and never asks for a mesh."""

    num_devices: int = 1
    num_experts: int | None = None  # whose weights are here; None: all of the model's

    @property
    def is_whole(self) -> bool:
        """Whether there are no others."""
        return self.num_devices == 1

    def add_up(self, x: jax.Array) -> jax.Array:
        """The sum of all parts' `x`, on every device."""
        return x if self.is_whole else lax.psum(x, MODEL_AXES)

    def first(self, size: int) -> jax.Array | int:
        """Where this part begins in a dimension of which every part has `size`."""
        return 0 if self.is_whole else lax.axis_index(MODEL_AXES) * size

    def take_rows(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows `ids` [T] of a table whose rows lie over the devices, of which this one has `table` [V, D]: [T, D].

        Ids are within the whole table.
        """
        if self.is_whole:
            return jnp.take(table, ids, axis=0, mode="clip")
        ids = ids - self.first(table.shape[0])
        is_here = (ids >= 0) & (ids < table.shape[0])
        rows = jnp.take(table, jnp.where(is_here, ids, 0), axis=0, mode="clip")
        return self.add_up(jnp.where(is_here[:, None], rows, jnp.zeros((), rows.dtype)))

    def own_experts(self, ids: jax.Array, num_experts: int) -> jax.Array:
        """Experts `ids` of `num_experts` in all, counted from the first one here; nobody stays nobody."""
        if self.num_experts is None or self.is_whole:
            return ids
        is_somebody = (ids >= 0) & (ids < num_experts)
        return jnp.where(is_somebody, ids - lax.axis_index(EXPERT) * self.num_experts, -1)


WHOLE = Part()
