"""A device's part of a model: what its modules have to know about the others, inside shard_map."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.models.sharding import EXPERT, MODEL_AXES

# From as many tokens on each device adds and norms a share of a step's rows.  It halves what a collective moves and
# doubles their number.  Forward passes of Llama 8B over four GPUs with all rows on each and with a share, ms: 71.2 and
# 69.1 for 8448 tokens, 12.1 and 14.0 for 1056; of two machines, so less comparable, 37.0 and 37.4 for 4224, 20.5 and
# 22.2 for 2112 (python -m benchmarks.h100.forward --engine tensor_parallel_size=4 --shapes mixed:8448@4,…, with this at
# 1000 or 100000; 4 x H100, jax 0.11.2, 2026-11-26).  Over other numbers of GPUs and on TPUs nothing was measured.  A
# step's scratch becomes smaller by it (compiled for 2, 4 and 8 CPU devices): memory_plan.py need not know.
SCATTERED_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Part:
    """One of `num_devices` equal parts.  The whole model is one of one, and never asks for a mesh."""

    num_devices: int = 1
    num_experts: int | None = None  # whose weights are here; None: all of the model's

    @property
    def is_whole(self) -> bool:
        """Whether there are no others."""
        return self.num_devices == 1

    def add_up(self, x: jax.Array, *, scatter: bool = False) -> jax.Array:
        """The sum of all parts' `x` [T, D], on every device; with `scatter` its own rows, [T / devices, D]."""
        if self.is_whole:
            return x
        return lax.psum_scatter(x, MODEL_AXES, tiled=True) if scatter else lax.psum(x, MODEL_AXES)

    def scatters(self, num_tokens: int) -> bool:
        """Whether devices have a share each of the residual stream's rows in a step of so many tokens.

        Sequence parallelism (Korthikanti et al. 2022).  Else, as where the devices do not divide the tokens, all have
        all rows, and do the same additions and norms.
        """
        return not self.is_whole and num_tokens >= SCATTERED_TOKENS and num_tokens % self.num_devices == 0

    def own_rows(self, x: jax.Array) -> jax.Array:
        """This device's rows of `x` [T, ...], which all devices have: [T / devices, ...]."""
        count = x.shape[0] // self.num_devices
        return lax.dynamic_slice_in_dim(x, self.first(count), count)

    def all_rows(self, x: jax.Array) -> jax.Array:
        """The rows of all devices, of which this one has `x` [T / devices, ...]: [T, ...]."""
        return lax.all_gather(x, MODEL_AXES, tiled=True)

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
