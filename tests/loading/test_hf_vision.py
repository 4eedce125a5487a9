"""vision_config of every supported architecture, nested or not, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import CheckpointError
from jaxserve.loading.hf_config import model_config_from_hf
from tests.loading.published import QWEN2_5_VL, nested


def test_a_tower_with_windows() -> None:
    config = model_config_from_hf(QWEN2_5_VL, "config.json")
    vision = config.vision
    assert vision is not None
    assert (config.family, config.head_dim, config.qkv_bias) == ("qwen2_5_vl", 128, True)
    assert (vision.head_dim, vision.window_size, vision.full_attention_layers) == (80, 8, (7, 15, 23, 31))
    assert vision.mrope_sections == (16, 24, 24)
    assert vision.image_marker_ids == (151652, 151655, 151653)
    assert config.rope_scaling is None
    assert model_config_from_hf(nested(QWEN2_5_VL), "config.json") == config


def test_a_tower_without_windows() -> None:
    """Qwen2-VL-2B, whose tower says hidden_size where it means what it gives."""
    vision_config = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "in_chans": 3,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    published = QWEN2_5_VL | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vision_config": vision_config,
    }
    vision = model_config_from_hf(published, "config.json").vision
    assert vision is not None
    assert (vision.hidden_size, vision.intermediate_size, vision.window_size) == (1280, 5120, None)
    assert vision.full_attention_layers == tuple(range(32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_config": None}, "vision_config is None"),
        (
            {"vision_config": QWEN2_5_VL["vision_config"] | {"out_hidden_size": 2048}},
            "out_hidden_size is 2048",
        ),
        ({"vision_config": QWEN2_5_VL["vision_config"] | {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        (
            {"vision_config": QWEN2_5_VL["vision_config"] | {"fullatt_block_indexes": [40]}},
            r"fullatt_block_indexes has \[40\], and depth is 32",
        ),
        ({"vision_config": QWEN2_5_VL["vision_config"] | {"num_heads": 0}}, "num_heads is 0"),
        ({"vision_config": QWEN2_5_VL["vision_config"] | {"patch_size": 0}}, "patch_size is 0"),
        (
            {"vision_config": QWEN2_5_VL["vision_config"] | {"spatial_merge_size": 0}},
            "spatial_merge_size is 0",
        ),
        ({"image_token_id": 10**6}, "image_token_id is 1000000, which is outside the vocabulary"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "three numbers"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 8]}}, "half of head_dim"),
    ],
)
def test_what_a_tower_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        model_config_from_hf(QWEN2_5_VL | changes, "config.json")
