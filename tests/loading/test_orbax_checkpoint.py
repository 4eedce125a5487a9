"""Converted checkpoints: what Orbax makes of them, damage of every kind, and restoring into shardings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import ModelConfig
from jaxserve.conversion import sources
from jaxserve.conversion.convert import convert
from jaxserve.conversion.sources import chunk_grid
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading import orbax_checkpoint, orbax_restore
from jaxserve.loading.boxes import whole_box
from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
from jaxserve.loading.orbax_format import (
    MANIFEST,
    STATE,
    Manifest,
    ParameterLayout,
    read_manifest,
    write_manifest,
)
from jaxserve.loading.orbax_restore import chunks_within
from jaxserve.loading.resolve import open_checkpoint
from jaxserve.loading.weights import load_state
from jaxserve.models.layout import Move
from jaxserve.models.parameters import abstract_model, parameter_name
from tests.conversion.models import assert_same, parameters_of, write_directory
from tests.pretend_devices import run_on_devices


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of a model with biases, cut into many chunks."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "LEAST_CHUNK_BYTES", 64)
        convert(str(write_directory(folder / "source", "qwen2_yarn")), folder / "converted", progress=False)
    return folder / "converted"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def all_files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_orbax_reads_it(whole: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    expected = parameters_of(whole, "float16")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract: dict[str, Any] = {}
    for name, value in expected.items():
        *path, last = name.split(".")
        branch = abstract
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    for tree in (ocp.load(str(whole)), ocp.load(str(whole), abstract)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found = {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
        assert_same(found, expected)


class TestDamage:
    """Nothing that is not as it was written is served; the error names the file."""

    def refusal(self, directory: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            parameters_of(directory)
        return str(error.value)

    def test_a_flipped_bit_anywhere(self, copy: Path) -> None:
        """In the middle of every file, of which a few kinds there are many."""
        names = [name for name in all_files(copy) if not name.startswith(STATE) or ".1." in name]
        assert any("c.0" in name for name in names)
        for name in [*names, f"{STATE}/_METADATA"]:
            path = copy / name
            data = bytearray(path.read_bytes())
            if not data:
                continue
            data[len(data) // 2] ^= 0x10
            path.write_bytes(data)
            message = self.refusal(copy)
            assert message.startswith(f"{path}: damaged"), message
            data[len(data) // 2] ^= 0x10
            path.write_bytes(data)
        parameters_of(copy)

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (lambda path: path.unlink(), "missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated: expected"),
            (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "too long: expected"),
        ],
    )
    def test_missing_and_of_another_size(
        self, harm: Callable[[Path], object], message: str, copy: Path
    ) -> None:
        texts = ("config.json", "tokenizer.json", "_CHECKPOINT_METADATA")
        parameter = f"{STATE}/layers.1.attention.qkv_bias"
        for name in (*texts, f"{STATE}/_METADATA", f"{parameter}/zarr.json", f"{parameter}/c.1.0.0"):
            path = copy / name
            data = path.read_bytes()
            harm(path)
            told = "damaged or edited" if name in texts and message != "missing" else message
            with pytest.raises(CheckpointError, match=f"{path}: {told}"):
                OrbaxCheckpoint(copy)  # when it is opened already
            path.write_bytes(data)

    def test_two_chunks_changed_about(self, copy: Path) -> None:
        first, second = (copy / STATE / "embedding" / name for name in ("c.0.0", "c.1.0"))
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        assert "embedding/c." in self.refusal(copy)

    def test_a_file_that_shrinks_before_it_is_read(self, copy: Path) -> None:
        """It is not left open either, which would be a warning."""
        checkpoint = OrbaxCheckpoint(copy)
        path = copy / STATE / "norm.scale" / "c.0"
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(CheckpointError, match=rf"{path}: truncated: expected 64 bytes, found 62"):
            checkpoint.read("norm.scale")

    def test_a_file_that_shrinks_while_it_is_read(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = OrbaxCheckpoint(copy)
        path = copy / STATE / "norm.scale" / "c.0"
        monkeypatch.setattr(orbax_checkpoint, "_check_size", lambda path, expected: None)
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(CheckpointError, match=rf"{path}: truncated while it was read"):
            checkpoint.read("norm.scale")

    def test_the_manifest(self, copy: Path) -> None:
        manifest = copy / MANIFEST
        text = manifest.read_text()
        for changed in (text[:-1], "[]", "{}", text.replace('"format":1', '"format":2')):
            manifest.write_text(changed)
            assert self.refusal(copy).startswith(f"{manifest}: damaged")
        manifest.unlink()
        assert self.refusal(copy).startswith(f"{copy}: has no {MANIFEST}; only Orbax checkpoints that")

    def test_a_manifest_of_another_version_or_that_points_elsewhere(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = read_manifest(copy)
        with monkeypatch.context() as patch:
            patch.setattr("jaxserve.loading.orbax_format._FORMAT", 7)
            write_manifest(copy, whole)
        assert "in format 7, and this version of jaxserve reads format 1" in self.refusal(copy)
        files = {**whole.files, "../secret": next(iter(whole.files.values()))}
        write_manifest(copy, Manifest(whole.layouts, whole.checksums, files))
        assert "'../secret' is not within the checkpoint" in self.refusal(copy)
        layouts = {**whole.layouts, "a/../b": whole.layouts["norm.scale"]}
        checksums = {**whole.checksums, "a/../b": whole.checksums["norm.scale"]}
        write_manifest(copy, Manifest(layouts, checksums, whole.files))
        assert "'a/../b' is no parameter's name" in self.refusal(copy)


class TestOtherModel:
    """A checkpoint whose parameters are not those of its config is refused before anything is read."""

    def rewritten(self, directory: Path, layouts: dict[str, ParameterLayout | None]) -> str:
        manifest = read_manifest(directory)
        all_layouts = {**manifest.layouts, **layouts}
        kept = {name: layout for name, layout in all_layouts.items() if layout is not None}
        checksums = {name: manifest.checksums.get(name, (0,)) for name in kept}
        for name, layout in layouts.items():
            if layout is not None and name not in manifest.layouts:
                (directory / STATE / name).mkdir()
                (directory / STATE / name / "c.0").write_bytes(bytes(layout.chunk_bytes))
        write_manifest(directory, Manifest(kept, checksums, manifest.files))
        with pytest.raises(CheckpointError) as error:
            parameters_of(directory)
        return str(error.value)

    def test_a_missing_and_an_extra_parameter(self, copy: Path) -> None:
        extra = ParameterLayout((4,), "float32", (1,))
        message = self.rewritten(
            copy, {"layers.1.attention.o": None, "layers.0.attention.q_norm.scale": extra}
        )
        assert message == (
            f"{copy}: does not fit its own config: "
            "tensors that the model needs are missing (1): layers.1.attention.o; "
            "tensors that the model has no place for (1): layers.0.attention.q_norm.scale"
        )

    def test_a_parameter_of_another_shape(self, copy: Path) -> None:
        stored = read_manifest(copy).layouts["norm.scale"]
        assert stored == ParameterLayout((32,), "float16", (1,))
        message = self.rewritten(copy, {"norm.scale": ParameterLayout((4, 8), "float16", (1, 1))})
        assert message.endswith(
            "c.0.0: missing; convert the model again or copy the file from where it is whole"
        )
        (copy / STATE / "norm.scale" / "c.0").rename(copy / STATE / "norm.scale" / "c.0.0")
        message = self.rewritten(copy, {})
        assert "contradicts the config (1): norm.scale is [4, 8], not [32]" in message


def test_what_orbax_or_somebody_else_wrote(tmp_path: Path) -> None:
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    for load_format in ("auto", "orbax"):
        with pytest.raises(CheckpointError, match=r"has no jaxserve\.json; only Orbax checkpoints that"):
            open_checkpoint(str(tmp_path), load_format)
    with pytest.raises(ConfigError, match="use auto, safetensors, gguf or orbax"):
        open_checkpoint(str(tmp_path), "dummy")


def test_another_format_asked_of_a_converted_checkpoint(whole: Path) -> None:
    assert isinstance(open_checkpoint(str(whole), "orbax"), OrbaxCheckpoint)
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(str(whole), "safetensors")
    with pytest.raises(CheckpointError, match=r"holds no \.gguf file"):
        open_checkpoint(str(whole), "gguf")


def test_restored_arrays_are_their_own(copy: Path) -> None:
    """They outlive the files, which nothing maps."""
    found = parameters_of(copy)
    expected = {name: value.copy() for name, value in found.items()}
    for path in copy.rglob("c.*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_same(found, expected)


def test_host_memory_is_used_again_for_devices_that_have_their_own(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transfers that copy, as to an accelerator, buffers are few and none is filled while it is needed."""
    expected = parameters_of(whole)
    honest, addresses = jax.device_put, []

    def transfer(value: np.ndarray, target: Any) -> jax.Array:
        addresses.append(value.ctypes.data)
        return honest(np.array(value), target)

    monkeypatch.setattr(orbax_restore.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(orbax_restore.jax, "device_put", transfer)
    monkeypatch.setattr(orbax_restore, "_LEAST_BUDGET", 1)
    assert_same(parameters_of(whole), expected)
    assert len(addresses) == len(expected)
    assert len(set(addresses)) < len(addresses)


@dataclass(frozen=True)
class Shifted:
    """A layout with two rows before each parameter, the first of which is the parameter's last, and one behind it."""

    config: ModelConfig

    def moves(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> list[Move]:
        del axes
        rest = whole_box(shape[1:])
        rows, last = slice(0, shape[0]), slice(shape[0] - 1, shape[0])
        return [
            Move((rows, *rest), (slice(2, 2 + shape[0]), *rest)),
            Move((last, *rest), (slice(0, 1), *rest)),
        ]


def test_numbers_stand_where_a_layout_says_and_zeros_elsewhere(whole: Path) -> None:
    expected = parameters_of(whole)
    for checkpoint in (open_checkpoint(str(whole)), open_checkpoint(str(whole.parent / "source"))):
        _, stored = abstract_model(checkpoint.config, jnp.dtype("float32"))
        padded = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] + 3, *leaf.shape[1:]), leaf.dtype), stored
        )
        layout: Any = Shifted(checkpoint.config)  # as far as loading asks
        state = load_state(checkpoint, padded, layout, progress=False)
        for path, parameter in nnx.to_flat_state(state):
            value, found = expected[parameter_name(path)], np.asarray(parameter.get_value())
            assert found[2:-1].tobytes() == value.tobytes(), path
            assert (found[0] == value[-1]).all()
            assert not found[1].any()
            assert not found[-1].any()


AXES = st.sampled_from(["vocab", "embed", "kv_heads", "heads", "head_dim", "ffn", "group", "expert"])


@given(st.lists(st.tuples(st.integers(1, 4000), AXES), min_size=1, max_size=4), st.sampled_from([2, 4]))
def test_chunks_are_equal_and_of_reasonable_size(dimensions: list[tuple[int, str]], itemsize: int) -> None:
    shape, axes = zip(*dimensions, strict=True)
    grid = chunk_grid(shape, axes, itemsize)
    assert all(size % count == 0 for size, count in zip(shape, grid, strict=True))
    num_bytes = int(np.prod(shape, dtype=object)) * itemsize // int(np.prod(grid, dtype=object))
    if max(grid) > 1:
        assert num_bytes >= sources.LEAST_CHUNK_BYTES
    cut = [i for i, axis in enumerate(axes) if axis not in ("embed", "head_dim", "group")]
    assert all(count == 1 for i, count in enumerate(grid) if i not in cut)
    if num_bytes > sources.MOST_CHUNK_BYTES:  # nothing more can be cut in two
        assert all(shape[i] // grid[i] % 2 for i in cut)


@pytest.mark.parametrize(
    ("shape", "axes", "grid"),
    [
        ((4096, 8, 6, 128), ("embed", "kv_heads", "group", "head_dim"), (1, 8, 1, 1)),  # of Llama-3.1-8B
        ((32, 128, 4096), ("heads", "head_dim", "embed"), (8, 1, 1)),
        ((4096, 2, 14336), ("embed", "gate_up", "ffn"), (1, 1, 8)),
        ((14336, 4096), ("ffn", "embed"), (8, 1)),
        ((128256, 4096), ("vocab", "embed"), (16, 1)),
        ((4096, 128256), ("embed", "vocab"), (1, 16)),
        ((4096,), ("embed",), (1,)),
        ((128, 2048, 1536), ("expert", "embed", "expert_gate_up"), (16, 1, 1)),  # of Qwen3-30B-A3B
        ((8, 16384, 6144), ("expert", "expert_ffn", "embed"), (8, 4, 1)),  # of Mixtral-8x22B
        ((576, 3, 5, 64), ("embed", "kv_heads", "group", "head_dim"), (1, 1, 1, 1)),  # of SmolLM2-135M
    ],
)
def test_where_real_parameters_are_cut(
    shape: tuple[int, ...], axes: tuple[str, ...], grid: tuple[int, ...]
) -> None:
    assert chunk_grid(shape, axes, 2) == grid


@given(st.data())
def test_only_chunks_with_something_in_them_are_read(data: st.DataObject) -> None:
    """Against a look at every element."""
    grid = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = [count * data.draw(st.integers(1, 3)) for count in grid]
    layout = ParameterLayout(tuple(shape), "float32", tuple(grid))
    boxes = []
    for _ in range(data.draw(st.integers(1, 2))):
        starts = [data.draw(st.integers(0, size - 1)) for size in shape]
        stops = [data.draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True)]
        boxes.append(tuple(map(slice, starts, stops)))
    wanted = np.zeros(shape, bool)
    for box in boxes:
        wanted[box] = True
    expected = [index for index in layout.chunks() if wanted[layout.box(index)].any()]
    assert chunks_within(layout, boxes) == expected


def test_into_every_sharding_on_eight_devices(whole: Path) -> None:
    source = whole.parent / "source"
    printed = run_on_devices(8, "tests.loading.restore_on_eight_devices", str(source), str(whole))
    assert json.loads(printed)["ways"] == [1, 2, 4, 8]
