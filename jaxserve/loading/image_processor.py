"""How a checkpoint wants images prepared, from its preprocessor_config.json or processor_config.json."""

from __future__ import annotations

from pathlib import Path

from jaxserve.config import ImageProcessorConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading.fields import Fields
from jaxserve.loading.json_file import read_json_object

# Each of these follows the same rules; they differ in the library that transformers uses.
_TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC

# OpenAI's CLIP, whose values transformers' Qwen2VLImageProcessor takes where a file says nothing.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def read_image_processor(directory: Path) -> ImageProcessorConfig:
    """The settings of a checkpoint directory; what they leave out is as in transformers.

    Sizes come in three forms: min_pixels and max_pixels, the same within `size`, or size's shortest_edge and
    longest_edge, which mean pixels all the same.

    Raises CheckpointError naming what is missing, damaged or of another kind.
    """
    fields = _fields(directory)
    kind = fields.string("image_processor_type", absent=_TYPES[0])
    if kind not in _TYPES:
        raise fields.error(
            f"image_processor_type {kind!r:.60} is not supported; one of {', '.join(_TYPES)} is"
        )
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not fields.boolean(step, absent=True):
            raise fields.error(f"{step} is false; images without this step are not supported")
    if fields.integer("resample", absent=_BICUBIC) != _BICUBIC:
        raise fields.error(
            f"resample is {fields.values['resample']!r}; only {_BICUBIC} (bicubic) is supported"
        )
    try:
        return ImageProcessorConfig(
            patch_size=fields.integer("patch_size", absent=14),
            temporal_patch_size=fields.integer("temporal_patch_size", absent=2),
            merge_size=fields.integer("merge_size", absent=2),
            min_pixels=_pixels(fields, "min_pixels", "shortest_edge", 56 * 56),
            max_pixels=_pixels(fields, "max_pixels", "longest_edge", 28 * 28 * 1280),
            rescale_factor=fields.number("rescale_factor", absent=1 / 255),
            image_mean=_per_channel(fields, "image_mean", _MEAN),
            image_std=_per_channel(fields, "image_std", _STD),
        )
    except ConfigError as error:
        raise fields.error(str(error)) from error


def _fields(directory: Path) -> Fields:
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return Fields(read_json_object(path), str(path))
    path = directory / "processor_config.json"  # where transformers 5 writes all of a processor's parts
    if path.is_file():
        nested = read_json_object(path).get("image_processor")
        if isinstance(nested, dict):
            return Fields(nested, f"{path}: image_processor")
    raise CheckpointError(
        f"{directory}: no preprocessor_config.json, and no processor_config.json with an image_processor; a model "
        "that takes images needs one of them"
    )


def _pixels(fields: Fields, name: str, edge: str, absent: int) -> int:
    if fields.has(name):
        return fields.integer(name)
    size = fields.values.get("size")
    if size is None:
        return absent
    if not isinstance(size, dict):
        raise fields.error(f"size is {size!r:.60}; it must be an object with shortest_edge and longest_edge")
    inner = Fields(size, f"{fields.where}: size")
    return inner.integer(name if inner.has(name) else edge)


def _per_channel(fields: Fields, name: str, absent: tuple[float, float, float]) -> tuple[float, float, float]:
    values = fields.values.get(name)
    if values is None:
        return absent
    if not isinstance(values, list) or len(values) != 3:
        raise fields.error(f"{name} is {values!r:.60}; it must be three numbers, of red, green and blue")
    red, green, blue = (Fields({name: value}, fields.where).number(name) for value in values)
    return red, green, blue
