"""Reads what a Hugging Face config says of a vision tower, in the layouts of transformers 4 and 5."""

from __future__ import annotations

import re
from typing import Any

from jaxserve.config import VisionConfig
from jaxserve.loading.fields import MAX_LAYERS, MOST, Fields

# Published under names without the first part; transformers from 4.52 on has them inside of a model.
_RENAMED = ((re.compile(r"model\.visual\."), "visual."), (re.compile(r"model\.language_model\."), "model."))
_MROPE_SECTIONS = [16, 24, 24]  # the format's own, where a file does not say


def no_vision(config: Fields, language: Fields) -> None:
    """Of architectures that read text alone."""
    del config, language


def qwen2_vl_vision(config: Fields, language: Fields) -> VisionConfig:
    """A tower that attends to whole images in every layer; `language` are the fields of the language model."""
    vision = _vision_fields(config)
    hidden_size = vision.integer("embed_dim", absent=1280, least=1)
    _check_activation(vision, "quick_gelu")
    _check_width(vision, "hidden_size", language)
    num_layers = vision.integer("depth", absent=32, least=1, most=MAX_LAYERS)
    widened = hidden_size * vision.number("mlp_ratio", absent=4)
    if not 1 <= widened <= MOST:
        raise vision.error(
            f"mlp_ratio is {vision.number('mlp_ratio')}, which leaves no width of {hidden_size}"
        )
    return _vision(
        config,
        language,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=int(widened),
        window_size=None,
        full_attention_layers=tuple(range(num_layers)),
    )


def qwen2_5_vl_vision(config: Fields, language: Fields) -> VisionConfig:
    """A tower that attends to windows, and to whole images in a few layers."""
    vision = _vision_fields(config)
    _check_activation(vision, "silu")
    _check_width(vision, "out_hidden_size", language)
    window, patch = (
        vision.integer("window_size", absent=112, least=1),
        vision.integer("patch_size", absent=14, least=1),
    )
    merge = vision.integer("spatial_merge_size", absent=2, least=1)
    if window < merge * patch:
        raise vision.error(
            f"window_size is {window}, less than one token of {merge} x {merge} patches of {patch} pixels"
        )
    full = (
        vision.integers("fullatt_block_indexes") if vision.has("fullatt_block_indexes") else [7, 15, 23, 31]
    )
    num_layers = vision.integer("depth", absent=32, least=1, most=MAX_LAYERS)
    if outside := [layer for layer in full if not 0 <= layer < num_layers]:
        raise vision.error(f"fullatt_block_indexes has {outside}, and depth is {num_layers}")
    return _vision(
        config,
        language,
        num_layers=num_layers,
        hidden_size=vision.integer("hidden_size", absent=3584, least=1),
        intermediate_size=vision.integer("intermediate_size", absent=3420, least=1),
        window_size=window // (merge * patch) * merge,
        full_attention_layers=tuple(sorted(full)),
    )


def language_fields(config: Fields) -> Fields:
    """The fields of the language model: of the whole file, or of text_config where there is one."""
    values: dict[str, Any] = {**config.values}
    text = values.pop("text_config", None)
    if text is not None:
        if not isinstance(text, dict):
            raise config.error(f"text_config is {text!r}; it must be an object")
        # As transformers reads it: either of the two may tie, and the class is the whole model's.
        tied = [holder.get("tie_word_embeddings") for holder in (values, text)]
        values |= text | {"architectures": config.values.get("architectures")}
        values["tie_word_embeddings"] = next((tie for tie in tied if tie), False)
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if isinstance(rope, dict):
            # "mrope" is the plain one: how positions have three parts is told by mrope_section.
            plain = {name: "default" for name in ("type", "rope_type") if rope.get(name) == "mrope"}
            values[key] = rope | plain
    return Fields(values, config.where)


def published_name(tensor: str) -> str:
    """The name under which checkpoints of these models were published, of a tensor that may have its newer name."""
    for pattern, published in _RENAMED:
        if pattern.match(tensor):
            return pattern.sub(published, tensor, count=1)
    return tensor


def _vision(
    config: Fields,
    language: Fields,
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    window_size: int | None,
    full_attention_layers: tuple[int, ...],
) -> VisionConfig:
    vision = _vision_fields(config)
    image_token_id = config.integer("image_token_id", absent=151655)
    # in_channels is what transformers reads; the published files have in_chans.
    channels = vision.integer("in_channels", absent=vision.integer("in_chans", absent=3))
    if channels != 3:
        raise vision.error(f"in_channels is {channels}; images have 3")
    start_id = config.integer("vision_start_token_id", absent=151652)
    end_id = config.integer("vision_end_token_id", absent=151653)
    vocab_size = language.integer("vocab_size", least=1)
    named = {
        "vision_start_token_id": start_id,
        "image_token_id": image_token_id,
        "vision_end_token_id": end_id,
    }
    for name, token_id in named.items():
        if not 0 <= token_id < vocab_size:
            raise config.error(
                f"{name} is {token_id}, which is outside the vocabulary (vocab_size is {vocab_size})"
            )
    return VisionConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=vision.integer("num_heads", absent=16, least=1),
        patch_size=vision.integer("patch_size", absent=14, least=1),
        temporal_patch_size=vision.integer("temporal_patch_size", absent=2, least=1),
        num_channels=channels,
        merge_size=vision.integer("spatial_merge_size", absent=2, least=1),
        window_size=window_size,
        full_attention_layers=full_attention_layers,
        mrope_sections=_mrope_sections(language),
        image_token_id=image_token_id,
        image_marker_ids=(start_id, image_token_id, end_id),
    )


def _vision_fields(config: Fields) -> Fields:
    values = config.values.get("vision_config")
    if not isinstance(values, dict):
        raise config.error(f"vision_config is {values!r}; it must be an object")
    return Fields(values, f"{config.where}: vision_config")


def _mrope_sections(language: Fields) -> tuple[int, int, int]:
    key = "rope_parameters" if language.has("rope_parameters") else "rope_scaling"
    values = language.values.get(key)
    rope = Fields(values if isinstance(values, dict) else {}, f"{language.where}: {key}")
    sections = rope.integers("mrope_section") if rope.has("mrope_section") else _MROPE_SECTIONS
    if len(sections) != 3 or min(sections) < 0:
        raise rope.error(f"mrope_section is {sections}; it must be three numbers, for time, rows and columns")
    return sections[0], sections[1], sections[2]


def _check_activation(vision: Fields, wanted: str) -> None:
    found = vision.string("hidden_act", absent=wanted)
    if found != wanted:
        raise vision.error(f"hidden_act is {found!r}; only {wanted!r} is supported")


def _check_width(vision: Fields, key: str, language: Fields) -> None:
    """The tower's tokens go where the language model's embeddings do."""
    width = vision.integer(key, absent=3584)
    if width != language.integer("hidden_size"):
        raise vision.error(
            f"{key} is {width}, but the language model's hidden_size is {language.integer('hidden_size')}"
        )
