"""`python -m tests.loading.restore_on_eight_devices SRC DST`: both into shardings over 1, 2, 4 and 8 devices."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import CheckpointError
from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
from jaxserve.loading.orbax_format import chunk_path
from jaxserve.loading.resolve import open_checkpoint
from jaxserve.loading.weights import load_state
from jaxserve.models.layout import plan_layout
from jaxserve.models.on_devices import abstract_on_devices
from jaxserve.models.parameters import abstract_model, parameter_name
from tests.models.golden import read_golden

SHARDED = ("vocab", "kv_heads", "heads", "ffn")


class Watched(OrbaxCheckpoint):
    """Counts how often each chunk is read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.num_reads: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def _open_chunk(self, name: str, index: tuple[int, ...]) -> Any:
        self.num_reads[name, index] += 1
        return super()._open_chunk(name, index)


def sharded(abstract: nnx.State, mesh: Mesh, axis: str) -> nnx.State:
    """The same abstract state laid over `axis` wherever a dimension can be."""

    def lay(parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        ways = mesh.shape[axis]
        names = parameter.get_metadata("axes")
        spec = [
            axis if name in SHARDED and size % ways == 0 else None
            for name, size in zip(names, parameter.shape, strict=True)
        ]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return parameter.replace(
            jax.ShapeDtypeStruct(parameter.shape, parameter.get_value().dtype, sharding=sharding)
        )

    return nnx.from_flat_state([(path, lay(value)) for path, value in nnx.to_flat_state(abstract)])


def arrays_of(state: nnx.State) -> dict[str, jax.Array]:
    return {parameter_name(path): value.get_value() for path, value in nnx.to_flat_state(state)}


def check(source: str, converted: str, mesh: Mesh, axis: str, dtype: str) -> None:
    """Both checkpoints against the source on one device, shard by shard."""
    original, checkpoint = open_checkpoint(source), Watched(open_checkpoint(converted).path)
    _, abstract = abstract_model(original.config, jnp.dtype(dtype))
    expected = arrays_of(load_state(original, abstract, progress=False))
    wanted = sharded(abstract, mesh, axis)
    specs = arrays_of(wanted)
    for opened in (checkpoint, original):
        found = arrays_of(load_state(opened, wanted, progress=False))
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.sharding == specs[name].sharding, name
            whole = np.asarray(expected[name])
            assert array.dtype == whole.dtype
            assert len(array.addressable_shards) == mesh.size
            for shard in array.addressable_shards:
                assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes(), (name, shard.index)
    # Together the devices need everything, and none of it twice.
    everything = {(name, index) for name, layout in checkpoint.layouts.items() for index in layout.chunks()}
    assert checkpoint.num_reads == Counter(everything)


def check_layout(source: str, converted: str, devices: Sequence[Any], dtype: str) -> None:
    """Both checkpoints as an engine over these devices has them: heads repeated, sizes padded with zeros."""
    original, checkpoint = open_checkpoint(source), Watched(open_checkpoint(converted).path)
    _, abstract = abstract_model(original.config, jnp.dtype(dtype))
    expected = arrays_of(load_state(original, abstract, progress=False))
    axes = {parameter_name(path): value.get_metadata("axes") for path, value in nnx.to_flat_state(abstract)}
    layout = plan_layout(original.config, len(devices))
    _, wanted = abstract_on_devices(layout, jnp.dtype(dtype), devices)
    for opened in (checkpoint, original):
        found = arrays_of(load_state(opened, wanted, layout, progress=False))
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.sharding == arrays_of(wanted)[name].sharding, name
            whole = np.asarray(expected[name])
            padded = np.zeros(array.shape, whole.dtype)
            for move in layout.moves(axes[name], whole.shape):
                padded[move.target] = whole[move.source]
            assert np.asarray(array).tobytes() == padded.tobytes(), name
    assert set(checkpoint.num_reads.values()) == {1}


def check_damage(converted: str, devices: Sequence[Any]) -> None:
    """A byte of a chunk that belongs to one device."""
    checkpoint = OrbaxCheckpoint(Path(converted))
    layout = plan_layout(checkpoint.config, len(devices))
    _, wanted = abstract_on_devices(layout, jnp.dtype("float32"), devices)
    name = max(checkpoint.layouts, key=lambda name: len(list(checkpoint.layouts[name].chunks())))
    path = Path(converted) / chunk_path(name, list(checkpoint.layouts[name].chunks())[-1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{path}: damaged"):
        load_state(checkpoint, wanted, layout, progress=False)
    path.write_bytes(whole)


def check_for_aliases(mesh: Mesh) -> None:
    """Shards must not be views of what was read: that may be a mapped file."""
    golden = read_golden("llama").checkpoint
    golden.weights = {name: _aligned(value.astype(np.float32)) for name, value in golden.weights.items()}
    _, abstract = abstract_model(golden.config, jnp.dtype("float32"))
    found = arrays_of(load_state(golden, sharded(abstract, mesh, "tensor"), progress=False))
    before = {name: np.array(array) for name, array in found.items()}
    for value in golden.weights.values():
        value[:] = 0
    for name, array in found.items():
        assert np.array_equal(np.asarray(array), before[name]), name


def _aligned(value: np.ndarray) -> np.ndarray:
    """A copy that JAX could take over as it is."""
    memory = np.empty(value.nbytes + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    copy = memory[offset : offset + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[:] = value
    return copy


def main() -> None:
    source, converted = sys.argv[1:]
    devices = np.array(jax.devices())
    assert len(devices) == 8
    ways = [1, 2, 4, 8]
    for count in ways:
        check(source, converted, Mesh(devices[:count], ("tensor",)), "tensor", "float16")
    check(source, converted, Mesh(devices.reshape(2, 4), ("data", "tensor")), "tensor", "float32")
    check(source, converted, Mesh(devices.reshape(4, 2)[::-1], ("data", "tensor")), "tensor", "bfloat16")
    for count in ways[1:]:
        check_layout(source, converted, jax.devices()[:count], "float16")
    check_damage(converted, jax.devices())
    check_for_aliases(Mesh(devices[:1], ("tensor",)))
    print(json.dumps({"ways": ways}))


if __name__ == "__main__":
    main()
