"""The closed set of shapes in which images are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.config import ImageProcessorConfig, VisionConfig
from jaxserve.engine.encoder_cache import PAGE_ROWS
from jaxserve.errors import ConfigError

_LEAST = {"cpu": 256}  # patches of the smallest call; several small images may share it
_LEAST_ELSEWHERE = (
    1024  # an accelerator reads the weights for as many in the time in which it multiplies them
)
_FINE = 8192  # up to here an accelerator has two buckets for every doubling
_CPU_IMAGE_TOKENS = (
    1024  # of the largest image, where nobody asks for more: 900 x 900 pixels of patches of 14
)
_CACHE_ROWS = {"cpu": 4096}  # tokens of images that are kept, or twice the largest image
_CACHE_ROWS_ELSEWHERE = 16384


@dataclass(frozen=True, slots=True)
class TowerShape:
    """One compiled tower: `num_images` images of up to `num_patches` patches each."""

    num_images: int  # B
    num_patches: int  # P
    num_blocks: int  # W, of windows; 0 for towers without
    block_size: int  # S

    @property
    def name(self) -> str:
        return f"tower_{self.num_images}x{self.num_patches}"

    @property
    def total(self) -> int:
        """Patches of a call, padding included."""
        return self.num_images * self.num_patches


@dataclass(frozen=True, slots=True)
class TowerLattice:
    """Every shape that a call of the tower can have, from the cheapest on."""

    shapes: tuple[TowerShape, ...]
    max_image_tokens: int  # of one image

    def shape(self, num_patches: Sequence[int]) -> TowerShape | None:
        """The cheapest call for images of so many patches each; None if no call takes all of them."""
        most = max(num_patches)
        return next(
            (
                shape
                for shape in self.shapes
                if shape.num_images >= len(num_patches) and shape.num_patches >= most
            ),
            None,
        )


@dataclass(frozen=True, slots=True)
class TowerSettings:
    """Everything decided about images."""

    lattice: TowerLattice
    processor: ImageProcessorConfig
    cache_rows: int  # tokens of images that the device keeps


def settle_tower(
    vision: VisionConfig,
    processor: ImageProcessorConfig,
    *,
    max_pixels: int | None,
    max_model_len: int,
    platform: str,
) -> TowerSettings:
    """Decide the largest image and how many are kept.  `max_pixels` is the operator's word on the former, if any.

    Raises ConfigError if the processor's patches are not the tower's.
    """
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        if getattr(processor, name) != getattr(vision, name):
            raise ConfigError(
                f"preprocessor_config.json says {name} {getattr(processor, name)}, and config.json's vision_config "
                f"{getattr(vision, name)}"
            )
    most = (max_pixels or processor.max_pixels) // processor.token_pixels**2
    if platform == "cpu" and max_pixels is None:
        most = min(most, _CPU_IMAGE_TOKENS)
    most = max(1, min(most, max_model_len - 1))
    # Two, in whole pages: one may be held by a sequence that waits for KV pages of one which wants the other.
    two_images = 2 * -(-most // PAGE_ROWS) * PAGE_ROWS
    return TowerSettings(
        build_tower_lattice(vision, max_image_tokens=most, platform=platform),
        processor,
        max(two_images, _CACHE_ROWS.get(platform, _CACHE_ROWS_ELSEWHERE)),
    )


def tower_bytes(vision: VisionConfig, lattice: TowerLattice, itemsize: int) -> int:
    """What the largest call takes beside weights and the cache, estimated.

    Compiled for an H100 without tuning, 32,768 patches of Qwen2.5-VL take 0.84 GiB, of which this makes 2.10: as of
    language models, some twice as much (jax 0.11.2, 2026-11-25).
    """
    from jaxserve.kernels_pallas.bidirectional import SCORES  # here, as the scheduler does without jax

    shape = max(lattice.shapes, key=lambda shape: shape.total)
    embed = vision.hidden_size * itemsize
    # Of each patch: the residual stream and its norm, and either a feed-forward as float32 or queries, keys and values.
    feed_forward = shape.total * 3 * vision.intermediate_size * 4
    # Of each slot of windows: queries, keys, values and outputs; scores and weights as float32.
    slots = shape.num_blocks * shape.block_size
    attention = shape.total * 6 * embed + slots * (4 * embed + 2 * vision.num_heads * shape.block_size * 4)
    whole = min(SCORES, vision.num_heads * shape.num_patches * shape.total)
    return shape.total * (4 * embed + vision.frame_values * 4) + max(feed_forward, attention) + whole * 8


def build_tower_lattice(vision: VisionConfig, *, max_image_tokens: int, platform: str) -> TowerLattice:
    """Buckets for images of up to `max_image_tokens` tokens."""
    most = max_image_tokens * vision.merged_patches
    least = _LEAST.get(platform, _LEAST_ELSEWHERE)
    # The smallest call may be cut among several images.
    calls = [(images, least // images) for images in (4, 2)]
    calls += [(1, size) for size in _sizes(least, most, is_fine=platform != "cpu")]
    block = 0 if vision.window_size is None else vision.window_size**2
    shapes = []
    for images, size in calls:
        size = -(-size // vision.merged_patches) * vision.merged_patches
        # Filled in order, two neighbouring blocks hold more than one block's worth of windows.
        blocks = 2 * -(-images * size // block) if block else 0
        shapes.append(TowerShape(images, size, blocks, block))
    return TowerLattice(tuple(sorted(shapes, key=lambda s: (s.total, s.num_patches))), max_image_tokens)


def _sizes(least: int, most: int, *, is_fine: bool) -> list[int]:
    """From `least` to at least `most`, doubling, and if `is_fine` half-way between as well up to _FINE."""
    sizes = [least]
    while sizes[-1] < most:
        last = sizes[-1]
        if not is_fine or last >= _FINE:
            sizes.append(2 * last)
        else:
            sizes.append(last * 3 // 2 if last & (last - 1) == 0 else last // 3 * 4)
    return sizes
