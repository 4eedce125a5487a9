"""A checkpoint read once for several engines alike."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx


class SharedWeights:
    """A model's parameters, read by the first replica that asks and copied from its devices by the others."""

    def __init__(self, num_replicas: int) -> None:
        self._num_left = num_replicas
        self._state: nnx.State | None = None

    def get(self, abstract: nnx.State, read: Callable[[], nnx.State]) -> nnx.State:
        """The parameters in the shardings of `abstract`; `read` gives them if nobody has asked before.

        Replicas are alike: what is cut, and how, is the same for all of them.
        """
        self._num_left -= 1
        found = read() if self._state is None else jax.tree.map(_copied, abstract, self._state)
        self._state = found if self._num_left else None  # let go with the last one
        return found


def _copied(spec: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
    """An array's shards on other devices, in the same order."""
    parts = {_bounds(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    sharding = spec.sharding
    assert sharding is not None
    shards = [
        jax.device_put(parts[_bounds(index, array.shape)], device)
        for device, index in sharding.addressable_devices_indices_map(array.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    assert index is not None
    return tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
