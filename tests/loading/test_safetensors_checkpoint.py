"""Hugging Face directories: round trips, and every way in which one can be broken."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import TensorInfo
from jaxserve.loading.safetensors_checkpoint import SafetensorsCheckpoint
from jaxserve.loading.safetensors_file import SafetensorsFile
from tests.loading.builders import (
    HF_CONFIG,
    hf_shapes,
    random_tensors,
    write_hf_directory,
    write_safetensors,
)
from tests.models.vision_cases import CONFIGS, checkpoint

TENSORS = random_tensors(hf_shapes())
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "stored_as"), [(np.float32, "F32"), (np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")]
)
def test_tensors_come_back_as_they_were_stored(
    tmp_path: Path, num_shards: int, dtype: type, stored_as: str
) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
    write_hf_directory(tmp_path, tensors, num_shards)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.tensors == {name: TensorInfo(t.shape, stored_as) for name, t in tensors.items()}
    assert checkpoint.config.family == "llama"
    with ThreadPoolExecutor(4) as pool:
        for name, got in zip(tensors, pool.map(checkpoint.read, tensors), strict=True):
            assert got.dtype == dtype
            assert np.array_equal(got, tensors[name]), name
            assert not got.flags.owndata, "a view of the file was promised"


def test_double_precision_is_rounded_to_single(tmp_path: Path) -> None:
    write_hf_directory(tmp_path, TENSORS | {"lm_head.weight": np.full((40, 256), 0.1, np.float64)})
    got = SafetensorsCheckpoint(tmp_path).read("lm_head.weight")
    assert got.dtype == np.float32
    assert np.all(got == np.float32(0.1))


def test_data_at_an_odd_offset_is_aligned_when_read(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.float32)
    header = {"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}
    for padding in range(4):
        path = tmp_path / f"{padding}.safetensors"
        write_safetensors(path, json.dumps(header).encode() + b" " * padding, values.tobytes())
        got = SafetensorsFile(path).read("x")
        assert got.flags.aligned
        assert np.array_equal(got, values)


def test_generation_config_is_read(tmp_path: Path) -> None:
    write_hf_directory(tmp_path, TENSORS)
    assert SafetensorsCheckpoint(tmp_path).defaults.eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "temperature": 0.5}))
    defaults = SafetensorsCheckpoint(tmp_path).defaults
    assert defaults.eos_token_ids == (5, 7)
    assert defaults.sampling == {"temperature": 0.5}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_truncated_and_padded_files_are_refused_with_both_sizes(tmp_path: Path, num_shards: int) -> None:
    write_hf_directory(tmp_path, TENSORS, num_shards)
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    whole = victim.read_bytes()
    for content, what in (
        (whole[:-1], "truncated"),
        (whole[: len(whole) // 2], "truncated"),
        (whole + b"\0", "too long"),
    ):
        victim.write_bytes(content)
        message = rf"{victim.name}: {what}: expected {len(whole)} bytes, found {len(content)}"
        with pytest.raises(CheckpointError, match=message):
            SafetensorsCheckpoint(tmp_path)


def test_a_header_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors: truncated"):
            SafetensorsFile(path)


def entry(begin: int, end: int, dtype: str = "F32", shape: list[Any] | None = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(12, 16)}, r"data of 'b' begins at byte \d+, not \d+"),
        ({"a": entry(0, 12), "b": entry(8, 16)}, r"data of 'b' begins at byte"),
        ({"a": entry(4, 16)}, r"data of 'a' begins at byte"),
        ({"a": entry(0, 16, shape=[2, 3])}, r"'a', F32 of shape \(2, 3\), needs 24 bytes"),
        ({"a": entry(16, 0)}, r"'a'"),
        ({"a": entry(0, 16, shape=[-4])}, r"entry of 'a' is"),
        ({"a": entry(0, 16, shape=[4.0])}, r"entry of 'a' is"),
        ({"a": entry(0, 16, shape=[True, 4])}, r"entry of 'a' is"),
        ({"a": {"dtype": "F32", "shape": [4]}}, r"entry of 'a' is"),
        ({"a": 3}, r"entry of 'a' is not an object"),
        ({"a": entry(0, 16, dtype="I8", shape=[16])}, r"'a' is stored as I8; only F64, F32, F16, BF16"),
        ({"a": entry(0, 16, dtype="F8_E4M3", shape=[16])}, r"'a' is stored as F8_E4M3"),
        ([1], r"not a JSON object"),
        (b"{]", r"header is not JSON"),
        pytest.param(b"[" * 100_000, r"header is not JSON", id="endless"),
        (b'{"\xff": 1}', r"header is not JSON"),
        (b'{"a": 1, "a": 2}', r"a key stands there twice"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: object, message: str) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, header, bytes(16))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{message}"):
        SafetensorsFile(path)


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        SafetensorsFile(path)
    path.write_bytes(b"<!DOCTYPE html><html>" * 10)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SafetensorsFile(path)


def test_missing_shard(tmp_path: Path) -> None:
    write_hf_directory(tmp_path, TENSORS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 files .* missing: model-00002-of-00003\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def edit_index(directory: Path, **changes: Any) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= changes
    (directory / INDEX).write_text(json.dumps(index))


def test_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    write_hf_directory(tmp_path, TENSORS, 3)
    edit_index(tmp_path, **{"model.embed_tokens.weight": "model-00002-of-00003.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"model-00002.*: holds no tensor 'model\.embed_tokens\.weight'"
    ):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "", 3])
def test_index_that_points_elsewhere(tmp_path: Path, shard: object) -> None:
    write_hf_directory(tmp_path, TENSORS, 3)
    edit_index(tmp_path, **{"lm_head.weight": shard})
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight' is said to be in .*, which is no file name"
    ):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_without_a_weight_map(tmp_path: Path, text: str) -> None:
    write_hf_directory(tmp_path, TENSORS, 3)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        SafetensorsCheckpoint(tmp_path)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    write_hf_directory(tmp_path, TENSORS, 3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    index = json.loads((tmp_path / INDEX).read_text())
    held = SafetensorsFile(shard).tensors
    index["weight_map"] = dict.fromkeys(held, "model-00001-of-00003.safetensors")
    index["weight_map"][next(iter(held))] = shard.name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"is in both model-00001.* and model-00002"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["pytorch_model.bin"],
            r"pickles \(pytorch_model\.bin\), which are never loaded.*convert them to safetensors",
        ),
        (["consolidated.00.pth"], r"pickles \(consolidated\.00\.pth\)"),
        (["model-00001-of-00002.safetensors"], r"neither model\.safetensors nor .*, only model-00001"),
        ([], r'holds no weights.*--load-format dummy.*load_format="dummy"'),
    ],
)
def test_directories_without_safetensors(tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=message):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "awq"}]
)
def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path, quantization: dict[str, Any]) -> None:
    write_hf_directory(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | {"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=rf"quantization_config says '{quantization['quant_method']}'"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds a list, not a JSON object"),
    ],
    ids=["open", "endless", "list"],
)
def test_broken_config(tmp_path: Path, text: str, message: str) -> None:
    write_hf_directory(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_models_that_see_are_published_under_two_sets_of_names(tmp_path: Path, family: str) -> None:
    weights = checkpoint(family).weights
    newer = {
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in weights.items()
    }
    for folder, tensors in (("published", weights), ("newer", newer)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(CONFIGS[family]))
        save_file(tensors, tmp_path / folder / "model.safetensors")
        opened = SafetensorsCheckpoint(tmp_path / folder)
        assert set(opened.tensors) == set(weights)
        assert np.array_equal(
            opened.read("visual.merger.mlp.2.weight"), weights["visual.merger.mlp.2.weight"]
        )
    both = newer | {"visual.merger.mlp.2.bias": weights["visual.merger.mlp.2.bias"]}
    save_file(both, tmp_path / "newer" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"visual\.merger\.mlp\.2\.bias"):
        SafetensorsCheckpoint(tmp_path / "newer")
