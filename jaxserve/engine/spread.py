"""An engine's arrays and programs over its devices: where what lies, and one program that all of them run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxserve.models.sharding import partition_spec


@dataclass(frozen=True, slots=True)
class Spread:
    """The devices that one of an engine's arrays tells of, all of them being over the same ones."""

    sharding: Sharding | None  # of any of them; None is the default device

    def spec(self, shape: tuple[int, ...], dtype: object, *axes: str) -> jax.ShapeDtypeStruct:
        """An array whose dimensions are called `axes`; those without a name are not divided."""
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._place(axes))  # type: ignore[arg-type]  # dtype-like

    def put(self, tree: Any) -> Any:
        """Arrays of the host on every device, in one transfer."""
        sharding = self._place(())
        if sharding is None or sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        # Over several hosts device_put would first compare what each of them gives.
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
        )

    def lower(
        self, function: Callable[..., Any], *args: Any, donate: int | tuple[int, ...] = (), outs: Any = None
    ) -> jax.stages.Lowered:
        """A program of `function`, which gets what one device has of the arguments.

        `args` are specs; `outs` are those of results that are divided among devices, in their places; None is for
        others.
        """
        return jax.jit(self._over_devices(function, args, outs), donate_argnums=donate).lower(*args)

    def _over_devices(
        self, function: Callable[..., Any], args: Sequence[Any], outs: Any
    ) -> Callable[..., Any]:
        """The same as a function of whole arrays."""
        if not isinstance(self.sharding, NamedSharding):
            return function
        return jax.shard_map(
            function,
            mesh=self.sharding.mesh,
            in_specs=jax.tree.map(_partition, tuple(args)),
            out_specs=jax.tree.map(_partition, outs, is_leaf=lambda spec: spec is None),
            check_vma=False,  # kernels do not say what they vary over
        )

    def _place(self, axes: Sequence[str]) -> Sharding | None:
        if isinstance(self.sharding, NamedSharding):
            return NamedSharding(self.sharding.mesh, partition_spec(axes, "of the engine"))
        return self.sharding


def _partition(spec: jax.ShapeDtypeStruct | None) -> PartitionSpec:
    """How an argument lies over the mesh."""
    return (
        spec.sharding.spec
        if spec is not None and isinstance(spec.sharding, NamedSharding)
        else PartitionSpec()
    )
