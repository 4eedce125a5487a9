"""The GGUF header reader: equal to the gguf package's own, and hard on damaged files."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import CheckpointError
from jaxserve.loading.gguf_file import read_gguf_header
from tests.loading.builders import finish, random_blocks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with every kind of field and three tensors, at an alignment of 64."""
    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -2_000_000_000)
    writer.add_uint64("a.u64", 2**63 + 1)
    writer.add_int64("a.i64", -(2**62))
    writer.add_float32("a.f32", 0.1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße, 世界")
    writer.add_key_value("a.strings", ["", "a", "Ġthe", "世界"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1000.0])
    writer.add_array("a.bools", [True, False])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor(
        "two", random_blocks((4, 512), GGMLQuantizationType.Q4_K), raw_dtype=GGMLQuantizationType.Q4_K
    )
    writer.add_tensor("three", np.arange(7, dtype=np.float16))
    finish(writer)
    return path


def test_fields_are_those_of_the_reference_reader(path: Path) -> None:
    header, reference = read_gguf_header(path), GGUFReader(path)
    expected = {
        name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")
    }
    assert dict(header.fields) == expected
    assert {name: type(value) for name, value in header.fields.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_tensors_are_those_of_the_reference_reader(path: Path) -> None:
    header, reference = read_gguf_header(path), GGUFReader(path)
    data = path.read_bytes()
    assert list(header.tensors) == [tensor.name for tensor in reference.tensors] == ["one", "two", "three"]
    for tensor in reference.tensors:
        ours = header.tensors[tensor.name]
        assert ours.kind == tensor.tensor_type
        assert ours.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert data[ours.start : ours.start + ours.num_bytes] == tensor.data.tobytes()


def test_truncated_data_is_refused_with_both_sizes(path: Path) -> None:
    last = read_gguf_header(path).tensors["three"]
    expected = last.start + last.num_bytes
    path.write_bytes(path.read_bytes()[: expected - 1])
    with pytest.raises(
        CheckpointError, match=rf"small\.gguf: truncated: expected {expected} bytes, found {expected - 1}"
    ):
        read_gguf_header(path)


def test_a_header_cut_anywhere_is_refused_by_name(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(read_gguf_header(path).tensors["one"].start):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"small\.gguf"):
            read_gguf_header(path)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_header_is_refused_or_read_but_never_anything_else(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for position in rng.integers(0, read_gguf_header(path).tensors["one"].start, 3):
        damaged[position] = rng.integers(256)
    other = path.with_name("damaged.gguf")
    other.write_bytes(damaged)
    try:
        header = read_gguf_header(other)
    except CheckpointError:
        return
    assert all(tensor.start + tensor.num_bytes <= len(whole) for tensor in header.tensors.values())


def _patched(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_wrong_tensor_offset(path: Path) -> None:
    entry = struct.pack("<Q3sI", 3, b"two", 2)
    data = path.read_bytes()
    at = data.index(entry) + len(entry) + 2 * 8 + 4  # past the dimensions and the type
    assert struct.unpack_from("<Q", data, at) == (64,)
    path.write_bytes(data[:at] + struct.pack("<Q", 0) + data[at + 8 :])
    with pytest.raises(CheckpointError, match="'two' is at data offset 0, not 64"):
        read_gguf_header(path)


def test_tensor_twice(path: Path) -> None:
    _patched(path, struct.pack("<Q3sI", 3, b"two", 2), struct.pack("<Q3sI", 3, b"one", 2))
    with pytest.raises(CheckpointError, match="tensor 'one' stands there twice"):
        read_gguf_header(path)


def test_field_twice(path: Path) -> None:
    _patched(path, b"a.i32", b"a.u32")
    with pytest.raises(CheckpointError, match=r"field 'a\.u32' stands there twice"):
        read_gguf_header(path)


def test_rows_that_are_no_whole_blocks(path: Path) -> None:
    _patched(
        path, struct.pack("<3sIQQI", b"two", 2, 512, 4, 12), struct.pack("<3sIQQI", b"two", 2, 511, 4, 12)
    )
    with pytest.raises(CheckpointError, match=r"'two' of shape \(4, 511\) cannot be stored as Q4_K"):
        read_gguf_header(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"GGUF\3\0\0\0", "truncated: 8 bytes"),
        (b"PK\3\4" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF file is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "holds no tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "truncated or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_whole_gguf_file(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_gguf_header(path)
