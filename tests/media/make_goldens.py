"""Records what transformers makes of the photographs: python -m tests.media.make_goldens (no torch needed).

The processor is the one on Pillow and NumPy.  vLLM's default is the one on torchvision, which resizes by PyTorch's
antialiased bicubic filter: on these photographs that differed from Pillow's by one or two of 256 levels in 0.1 to 0.4 %
of the values (torch 2.13 on a CPU, 2026-11-25).
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.media.photos import DATA, FORMS

# As Qwen2-VL and Qwen2.5-VL have them, and bounds that make the photographs smaller and larger.
SIZES: dict[str, tuple[int, int]] = {
    "as it is": (56 * 56, 28 * 28 * 16384),
    "smaller": (56 * 56, 28 * 28 * 20),
    "larger": (28 * 28 * 300, 28 * 28 * 1280),
}
ALL_SIZES = ("cat", "rocket")  # the other forms come in one size


def golden(data: bytes, bounds: tuple[int, int]) -> dict[str, Any]:
    """What is remembered of one image: enough to see any difference, and some values to look at."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": bounds[0], "longest_edge": bounds[1]})
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    made = processor(image, return_tensors="np")
    values = made["pixel_values"]
    return {
        "grid": made["image_grid_thw"][0].tolist(),
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "shape": list(values.shape),
        "sample": [float(value) for value in values[:: max(1, len(values) // 3), 500]],
    }


def main() -> None:
    """Write goldens.json."""
    goldens = {
        f"{form}, {size}": golden(make(), bounds)
        for form, make in FORMS.items()
        for size, bounds in SIZES.items()
        if form in ALL_SIZES or size == "as it is"
    }
    (DATA / "goldens.json").write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()
