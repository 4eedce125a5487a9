"""Image settings of a checkpoint: every form that transformers has written, and clear words for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import ImageProcessorConfig
from jaxserve.errors import CheckpointError
from jaxserve.loading.image_processor import read_image_processor

# As Qwen/Qwen2-VL-7B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct have them.
QWEN: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
SIZES = {"min_pixels": None, "max_pixels": None}


def read(directory: Path, content: Any, name: str = "preprocessor_config.json") -> ImageProcessorConfig:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / name).write_text(text)
    return read_image_processor(directory)


def test_real_settings(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN)
    assert (config.patch_size, config.temporal_patch_size, config.merge_size) == (14, 2, 2)
    assert (config.min_pixels, config.max_pixels, config.token_pixels) == (3136, 12845056, 28)
    assert config.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.rescale_factor == 1 / 255


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 3136, "longest_edge": 12845056},
        {"min_pixels": 3136, "max_pixels": 12845056},
    ],
)
def test_every_form_of_sizes(tmp_path: Path, size: dict[str, int]) -> None:
    whole = read(tmp_path, QWEN)
    assert read(tmp_path, {**QWEN, **SIZES, "size": size}) == whole
    # What stands outside of `size` wins, as in transformers.
    assert read(tmp_path, {**QWEN, "size": {"shortest_edge": 1, "longest_edge": 2}}) == whole


def test_the_file_of_a_whole_processor(tmp_path: Path) -> None:
    whole = read(tmp_path, QWEN)
    (tmp_path / "preprocessor_config.json").unlink()
    assert read(tmp_path, {"image_processor": QWEN}, "processor_config.json") == whole


def test_what_is_left_out_is_as_in_transformers(tmp_path: Path) -> None:
    config = read(tmp_path, {})
    assert (config.min_pixels, config.max_pixels) == (56 * 56, 28 * 28 * 1280)
    assert config.image_std == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ({**QWEN, "image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not supported"),
        ({**QWEN, "do_normalize": False}, "do_normalize is false"),
        ({**QWEN, "resample": 2}, "resample is 2; only 3"),
        ({**QWEN, "max_pixels": 100}, "max_pixels 100 is below min_pixels 3136"),
        ({**QWEN, "patch_size": 0}, "patch_size is 0"),
        ({**QWEN, "image_mean": [0.5]}, "image_mean is"),
        ({**QWEN, "image_mean": [0.5, 1e9, 0.5]}, "image_mean is .* from -1e6 to 1e6"),
        ({**QWEN, "image_std": [1, 0, 1]}, "image_std is .* from 1e-6 to 1e6"),
        ({**QWEN, "image_std": [1, 1, 1e-300]}, "image_std is .* from 1e-6 to 1e6"),
        ({**QWEN, "image_std": [-0.3, 0.3, 0.3]}, "image_std is .* from 1e-6 to 1e6"),
        ({**QWEN, "rescale_factor": 0}, "rescale_factor is 0.0; it must be from 1e-6 to 1e6"),
        ({**QWEN, **SIZES, "size": {"height": 3}}, "size: required key shortest_edge is missing"),
        ({**QWEN, **SIZES, "size": 3}, "size is 3"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, content)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no preprocessor_config.json, and no processor_config.json"):
        read_image_processor(tmp_path)
