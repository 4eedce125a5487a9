"""Reads the rotary embedding settings of a Hugging Face config, in the layouts of transformers 4 and 5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxserve.config import RopeScaling
from jaxserve.loading.fields import MOST, Fields
from jaxserve.models.rope_frequencies import yarn_attention_factor


@dataclass(frozen=True, slots=True)
class Rope:
    """What the config says about positions."""

    theta: float
    scaling: RopeScaling | None
    context: int  # max_position_embeddings, or what YaRN stretches it to


def rope_from_hf(fields: Fields, theta_absent: float | None) -> Rope:
    """Base, scaling and context of a config.json.

    transformers 4 writes rope_theta beside rope_scaling {type | rope_type, factor, ...}; transformers 5 puts
    all of it into rope_parameters.  `theta_absent` is the base where the file has none, if there is one.
    Raises CheckpointError for a scaling that is not supported, by its name.
    """
    rope, theta = _rope_fields(fields, theta_absent)
    if theta <= 1:
        raise fields.error(f"rope_theta is {theta}; it must be above 1")
    _refuse_partial(fields)
    _refuse_partial(rope)
    context = fields.integer("max_position_embeddings", least=1)
    kind = rope.string("rope_type", absent=rope.string("type", absent="default"))
    if kind == "default":
        return Rope(theta, None, context)
    if kind == "linear":
        return Rope(theta, RopeScaling("linear", _factor(rope), context), context)
    if kind == "llama3":
        return Rope(theta, _llama3(rope), context)
    if kind == "yarn":
        scaling = _yarn(rope, fields, context)
        # Qwen's way to switch YaRN on leaves max_position_embeddings at the trained length.
        stretched = int(scaling.original_max_position_embeddings * scaling.factor)
        return Rope(theta, scaling, max(context, stretched))
    raise rope.error(f"rope type {kind!r} is not supported; supported: default, linear, llama3, yarn")


def _rope_fields(fields: Fields, theta_absent: float | None) -> tuple[Fields, float]:
    layout = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    value: Any = fields.values.get(layout) or {}
    if not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values()):
        raise fields.error(f"{layout} is {value!r}; one object for all layers is supported")
    rope = Fields(value, f"{fields.where}: {layout}")
    holder = rope if rope.has("rope_theta") else fields
    return rope, holder.number("rope_theta", absent=theta_absent)


def _refuse_partial(fields: Fields) -> None:
    share = fields.number("partial_rotary_factor", absent=1.0)
    if share != 1:
        raise fields.error(f"partial_rotary_factor is {share}; only whole heads can be rotated")


def _factor(rope: Fields) -> float:
    factor = rope.number("factor")
    if not 1 <= factor <= MOST:
        raise rope.error(f"factor is {factor}; it must be at least 1, and at most {MOST}")
    return factor


def _llama3(rope: Fields) -> RopeScaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not 0 < low < high:
        raise rope.error(f"low_freq_factor is {low} and high_freq_factor {high}; wanted is 0 < low < high")
    original = rope.integer("original_max_position_embeddings", least=1)
    return RopeScaling("llama3", _factor(rope), original, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: Fields, fields: Fields, context: int) -> RopeScaling:
    if not rope.boolean("truncate", absent=True):
        raise rope.error("truncate is false, which is not supported; it must be true or absent")
    key = "original_max_position_embeddings"
    original = (fields if fields.has(key) else rope).integer(key, absent=context, least=1)
    factor = _factor(rope) if rope.has("factor") else context / original
    attention_factor = yarn_attention_factor(factor)
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    elif rope.number("mscale", absent=0.0) and rope.number("mscale_all_dim", absent=0.0):
        attention_factor = yarn_attention_factor(factor, rope.number("mscale"))
        divisor = yarn_attention_factor(factor, rope.number("mscale_all_dim"))
        if divisor <= 0:
            raise rope.error(f"mscale_all_dim is {rope.number('mscale_all_dim')}; it must be above 0")
        attention_factor /= divisor
    return RopeScaling(
        "yarn",
        factor,
        original,
        # The paper's values, which the format takes as given.
        beta_fast=rope.number("beta_fast", absent=32.0),
        beta_slow=rope.number("beta_slow", absent=1.0),
        attention_factor=attention_factor,
    )
