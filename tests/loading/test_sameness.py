"""Hosts find out that their copies of a checkpoint are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jaxserve.conversion.convert import convert
from jaxserve.loading.resolve import open_checkpoint
from jaxserve.loading.sameness import weights_digest
from tests.conversion.models import write_directory
from tests.loading.builders import hf_shapes, random_tensors, write_hf_directory


def digest(path: Path) -> str:
    return weights_digest(open_checkpoint(str(path)))


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_one_tensor_of_other_values_makes_another_checkpoint(
    tmp_path: Path, name: str, num_shards: int
) -> None:
    tensors = random_tensors(hf_shapes())
    write_hf_directory(tmp_path / "base", tensors, num_shards)
    write_hf_directory(tmp_path / "tuned", tensors | {name: tensors[name] * 1.01}, num_shards)
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    (tmp_path / "copy" / "consolidated.safetensors").write_bytes(b"of no use here")
    assert digest(tmp_path / "copy") == digest(tmp_path / "base") != digest(tmp_path / "tuned")


def test_what_each_host_has_converted_for_itself_is_the_same(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "source")
    for name in ("one", "other"):
        convert(str(source), tmp_path / name, progress=False)
    convert(str(source), tmp_path / "narrow", dtype="bfloat16", progress=False)
    assert digest(tmp_path / "one") == digest(tmp_path / "other") != digest(tmp_path / "narrow")
