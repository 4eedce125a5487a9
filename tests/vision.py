"""A scripted model that takes images: the byte tokenizer with Qwen2-VL's three tokens, and a template like its own."""

from __future__ import annotations

import base64
from typing import Any

from PIL import Image

from jaxserve.config import ImageProcessorConfig
from jaxserve.engine.protocol import ImageInfo
from tests.media.photos import file_of

TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
START, PAD, END = 262, 263, 264  # after the byte tokenizer's own

TEMPLATE = (
    "{% set images = namespace(count=0) %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set images.count = images.count + 1 %}"
    "{% if add_vision_id %}Picture {{ images.count }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PROCESSOR = ImageProcessorConfig(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=28 * 28,
    max_pixels=28 * 28 * 1280,
    rescale_factor=1 / 255,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)


def vision_info(**changes: Any) -> dict[str, Any]:
    """What makes scripted_info the info of a model that takes images of up to 64 tokens."""
    images = ImageInfo(
        marker_token_ids=(START, PAD, END), image_token_id=PAD, max_image_tokens=64, processor=PROCESSOR
    )
    return {"vocab_size": 265, "max_model_len": 512, "images": images, **changes}


def picture(across: int, down: int, colour: str = "red") -> Image.Image:
    """An image of across x down tokens."""
    return Image.new("RGB", (28 * across, 28 * down), colour)


def data_url(image: Image.Image | bytes) -> str:
    """An image, or whatever bytes, as a data: URL."""
    data = image if isinstance(image, bytes) else file_of(image)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def part(image: Image.Image | bytes, **more: Any) -> dict[str, Any]:
    """An image_url part."""
    return {"type": "image_url", "image_url": {"url": data_url(image), **more}}


def text(words: str) -> dict[str, Any]:
    """A text part."""
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": list(parts)}


def marker(num_tokens: int) -> str:
    """What an image is in an expanded prompt."""
    return f"<|vision_start|>{'<|image_pad|>' * num_tokens}<|vision_end|>"
