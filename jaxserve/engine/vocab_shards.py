"""Sampling from a vocabulary that lies over several devices, inside shard_map, without gathering a step's logits.

What concerns single tokens (mask, bias, penalties) each device does to its share of every row.  The most likely token
is the best of the shares' best.  For all else devices exchange shares, so that each has some rows whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.engine import vocab_search
from jaxserve.engine.sampler_state import SamplerState
from jaxserve.engine.sampling_rows import SamplingRows
from jaxserve.models.part import Part
from jaxserve.models.sharding import MODEL_AXES

_Tree = TypeVar("_Tree")
_WORD = 32  # tokens of a mask's word


@dataclass(frozen=True, slots=True)
class VocabShards:
    """How V tokens lie over the devices: this one has `width` of them, the last ones maybe tokens that do not exist."""

    part: Part
    vocab_size: int  # V
    width: int

    def without_padding(self, logits: jax.Array) -> jax.Array:
        """Logits [R, width] with -inf for tokens that do not exist."""
        if self.width * self.part.num_devices == self.vocab_size:
            return logits
        ids = self.part.first(self.width) + jnp.arange(self.width, dtype=jnp.int32)
        return jnp.where(ids < self.vocab_size, logits, -jnp.inf)

    def local_ids(self, ids: jax.Array) -> jax.Array:
        """Tokens counted from the first one here; `width`, which updates drop, for those of other devices."""
        local = ids - self.part.first(self.width)
        return jnp.where((local >= 0) & (local < self.width), local, self.width)

    def own(self, rows: SamplingRows, state: SamplerState) -> tuple[SamplingRows, SamplerState]:
        """What concerns the tokens of this device, as they are counted here."""
        mask = rows.allowed_mask
        if mask is not None:
            words = self.width // _WORD
            mask = jnp.pad(mask, ((0, 0), (0, words * self.part.num_devices - mask.shape[1])))
            mask = lax.dynamic_slice_in_dim(mask, self.part.first(words), words, axis=1)
        return replace(rows, allowed_mask=mask), replace(state, bias_ids=self.local_ids(state.bias_ids))

    def argmax(self, x: jax.Array, *, on_cpu: bool) -> jax.Array:
        """The most likely token of each row [R, width], the lowest among equals; int32 [R]."""
        ids = vocab_search.argmax(x, on_cpu=on_cpu)
        values = jnp.take_along_axis(x, ids[:, None], axis=1)[:, 0]
        pairs = jnp.stack([lax.bitcast_convert_type(values, jnp.int32), ids + self.part.first(self.width)])
        values, ids = jnp.moveaxis(lax.all_gather(pairs, MODEL_AXES), 1, 0)  # [devices, R] each
        best = jnp.argmax(lax.bitcast_convert_type(values, jnp.float32), axis=0)
        return jnp.take_along_axis(ids, best[None], axis=0)[0]

    def whole_rows(self, x: jax.Array) -> jax.Array:
        """From a share of each row [R, width] to this device's rows, whole, [ceil(R / devices), V]."""
        x = self._filled_up(x)
        return lax.all_to_all(x, MODEL_AXES, split_axis=0, concat_axis=1, tiled=True)[:, : self.vocab_size]

    def own_rows(self, rows: _Tree) -> _Tree:
        """The rows of arrays [R, ...] that whole_rows gives to this device; what fills R up is zeros."""
        return jax.tree.map(lambda x: self.part.own_rows(self._filled_up(x)), rows)

    def gather(self, rows: _Tree, count: int) -> _Tree:
        """All devices' rows of arrays, the first `count` of them, on every device."""
        return jax.tree.map(lambda x: self.part.all_rows(x)[:count], rows)

    def _filled_up(self, x: jax.Array) -> jax.Array:
        """x [R, ...] with rows of zeros until every device has as many."""
        missing = -x.shape[0] % self.part.num_devices
        return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
