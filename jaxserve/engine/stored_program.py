"""A compiled program as bytes, and the program again: on the devices it was compiled for, or on others like them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax._src.compiler import get_compile_options  # which JAX's own cache loads programs with
from jax.experimental import serialize_executable

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it

# Where a program does not depend on which devices of a kind it is compiled for, but on how many.  JAX's own cache takes
# GPUs' for such.  A TPU's are routed by where its chips are.
_MOVABLE = ("cpu", "gpu")


def place(devices: Sequence[Device]) -> object:
    """What a program depends on of where it is compiled for; its repr tells."""
    parts: list[tuple[object, ...]] = [
        (device.platform, device.device_kind, device.process_index) for device in devices
    ]
    if any(device.platform not in _MOVABLE for device in devices):
        parts.append(tuple(device.id for device in devices))
    return parts


def to_bytes(program: jax.stages.Compiled, devices: Sequence[Device]) -> bytes:
    """The program, which was compiled for these devices."""
    return pickle.dumps((_ids(devices), *serialize_executable.serialize(program)))


def from_bytes(stored: bytes | memoryview, devices: Sequence[Device]) -> jax.stages.Compiled:
    """The program on these devices, each in the place of one that it was compiled for.

    Never of bytes from strangers: loading runs what is in them.  Raises what pickle does for something else, and
    JaxRuntimeError where JAX refuses.
    """
    ids, serialized, in_tree, out_tree = pickle.loads(stored)
    if ids == _ids(devices):
        return serialize_executable.deserialize_and_load(
            serialized, in_tree, out_tree, execution_devices=devices
        )
    unloaded, args_info, no_kwargs = _Unpickler(serialized, dict(zip(ids, devices, strict=True))).load()
    return jax.stages.Compiled(
        unloaded.load(), [], in_tree.unflatten(args_info), out_tree, no_kwargs=no_kwargs
    )


def _ids(devices: Sequence[Device]) -> tuple[int, ...]:
    return tuple(device.id for device in devices)


class _Unpickler(serialize_executable._JaxPjrtUnpickler):
    """JAX's own reader, but for devices other than the program was compiled for.

    JAX's looks them up by their ids; and an executable goes where its options say, unless it is given others.
    """

    def __init__(self, serialized: bytes, devices: dict[int, Device]) -> None:
        """`devices`: those to use, by the ids that the program knows."""
        own, client = tuple(devices.values()), next(iter(devices.values())).client
        super().__init__(io.BytesIO(serialized), client, own)
        self.devices_by_id = devices
        self._options = get_compile_options(1, len(own), [_ids(own)], backend=client)

    def persistent_load(self, pid: Any) -> Any:
        """What stands for an object that is not pickled: an executable, a device or the client."""
        if pid[0] == "exec":
            return self.backend.deserialize_executable(
                pid[1], executable_devices=self.execution_devices, compile_options=self._options
            )
        return super().persistent_load(pid)
