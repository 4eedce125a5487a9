"""Small models that see: configs, weights and conversations that are the same wherever they are made.

tests/parity/qwen_vl.py gives the same ones to transformers, and writes down what it says (vision_goldens.json).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.config import ImageProcessorConfig
from jaxserve.engine.protocol import ImageInput
from jaxserve.loading.hf_config import model_config_from_hf
from tests.models.golden import MemoryCheckpoint, random_checkpoint

GOLDENS = Path(__file__).with_name("vision_goldens.json")
VISION_START, IMAGE, VISION_END = 262, 263, 264  # behind the byte tokenizer's own tokens
NUM_GENERATED = 6  # tokens of an answer
NUM_LOGITS = 24  # that goldens keep of a row

_LANGUAGE = {  # heads as in the 7B: seven queries to a key
    "vocab_size": 272,
    "hidden_size": 112,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 512,
    "max_window_layers": 2,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "image_token_id": IMAGE,
    "video_token_id": 265,
    "bos_token_id": None,
    "eos_token_id": None,
}
_TOWER = {
    "depth": 3,
    "num_heads": 4,
    "in_chans": 3,
    "patch_size": 4,
    "spatial_patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **_LANGUAGE,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vision_config": {**_TOWER, "embed_dim": 48, "hidden_size": 112, "mlp_ratio": 4},
    },
    "qwen2_5_vl": {
        **_LANGUAGE,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "vision_config": {
            **_TOWER,
            "hidden_size": 48,
            "intermediate_size": 60,
            "out_hidden_size": 112,
            "hidden_act": "silu",
            "window_size": 32,  # 8 patches
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    },
}
PROCESSOR = ImageProcessorConfig(
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=64,
    max_pixels=64 * 64,
    rescale_factor=1 / 255,
    image_mean=(0.48, 0.46, 0.41),
    image_std=(0.27, 0.26, 0.28),
)


@dataclass(frozen=True)
class Turn:
    """A prompt and its images."""

    token_ids: list[int]
    images: tuple[ImageInput, ...]


def checkpoint(name: str) -> MemoryCheckpoint:
    """The model under the names of published checkpoints; float16 holds its weights."""
    return random_checkpoint(name, model_config_from_hf(CONFIGS[name], name))


def conversation(*grids: tuple[int, int], seed: int = 0) -> Turn:
    """Text with an image of each grid (patches down and across) in it, after some words each."""
    random = np.random.RandomState(seed)
    token_ids = _words(random, 7)
    images = []
    for index, grid in enumerate(grids):
        token_ids.append(VISION_START)
        image = picture(grid, seed=100 * seed + index, offset=len(token_ids))
        token_ids += [IMAGE] * image.num_tokens
        token_ids += [VISION_END, *_words(random, 4 + index)]
        images.append(image)
    return Turn(token_ids, tuple(images))


@cache
def picture(grid: tuple[int, int], *, seed: int, offset: int) -> ImageInput:
    """Noise of so many patches down and across."""
    rows, columns = grid
    pixels = np.random.RandomState(seed).randint(0, 256, (rows * columns, 3, 4, 4), np.uint8).tobytes()
    return ImageInput(
        pixels=pixels,
        grid_thw=(1, rows, columns),
        content_hash=hashlib.sha256(pixels + bytes(grid)).hexdigest(),
        offset=offset,
        num_tokens=rows * columns // 4,
    )


def pixel_values(image: ImageInput) -> np.ndarray:
    """What transformers' processor would give for an image: [patches, C * T * pixels] float32."""
    patches = np.frombuffer(image.pixels, np.uint8).reshape(-1, 3, 1, 16).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (PROCESSOR.image_mean, PROCESSOR.image_std))
    frames = (patches / np.float32(255) - mean) / std
    return np.repeat(frames, 2, axis=2).reshape(len(patches), -1)


def goldens() -> dict[str, Any]:
    """By model and turn: what qwen_vl.py wrote."""
    return json.loads(GOLDENS.read_text())


def _words(random: np.random.RandomState, count: int) -> list[int]:
    return random.randint(0, 256, count).tolist()


# Sizes below, at and beyond windows; one token; wide and flat; two images and text in turns.
TURNS = {
    "text": conversation(),
    "one token": conversation((2, 2), seed=1),
    "windows": conversation((8, 16), seed=2),
    "odd sizes": conversation((10, 14), (22, 6), seed=3),
    "flat": conversation((2, 30), (4, 4), (30, 2), seed=4),
}
