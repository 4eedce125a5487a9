"""Reads Hugging Face config.json and generation_config.json into our own config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxserve.config import ExpertsConfig, ModelConfig, VisionConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.loading.fields import MAX_LAYERS, Fields
from jaxserve.loading.hf_experts import mixtral_experts, no_experts, qwen3_moe_experts
from jaxserve.loading.hf_rope import rope_from_hf
from jaxserve.loading.hf_vision import language_fields, no_vision, qwen2_5_vl_vision, qwen2_vl_vision

SAMPLING_KEYS = {  # generation_config.json -> SamplingParams
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def model_config_from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """The numbers in a config.json, which `where` names in errors.

    Raises CheckpointError for an unsupported architecture, a missing key or a value that cannot be served.
    A missing key has a meaning only where the format gives it one for this architecture (transformers'
    configuration_*.py).
    """
    whole = Fields(config, where)
    architecture = _architecture(whole)
    fields = whole if architecture.vision is no_vision else language_fields(whole)
    num_layers = fields.integer("num_hidden_layers", least=1, most=MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads", least=1)
    hidden_size = fields.integer("hidden_size", least=1)
    if architecture.head_dim_from_hidden and not fields.has("head_dim"):
        if hidden_size % num_heads:
            raise fields.error(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
            )
        head_dim = hidden_size // num_heads
    else:
        head_dim = fields.integer("head_dim", least=1)
    if head_dim % 2:
        raise fields.error(f"head_dim is {head_dim}; rotary embeddings need an even one")
    if fields.string("hidden_act") != "silu":
        raise fields.error(f"hidden_act is {fields.string('hidden_act')!r}; only 'silu' is supported")
    attention_bias = architecture.has_attention_bias and fields.boolean("attention_bias", absent=False)
    kv_heads_absent = num_heads if architecture.kv_heads_may_be_absent else None
    try:
        rope = rope_from_hf(fields, architecture.rope_theta_absent)
        return ModelConfig(
            family=architecture.family,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", least=1),
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", absent=kv_heads_absent, least=1),
            head_dim=head_dim,
            vocab_size=fields.integer("vocab_size", least=1),
            max_position_embeddings=rope.context,
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", absent=False),
            layer_windows=architecture.windows(fields, num_layers),
            qkv_bias=architecture.always_qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=architecture.has_mlp_bias and fields.boolean("mlp_bias", absent=False),
            qk_norm=architecture.qk_norm,
            hidden_act="silu",
            experts=architecture.experts(fields, num_layers),
            vision=architecture.vision(whole, fields),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def generation_defaults_from_hf(
    generation_config: dict[str, Any] | None, config: dict[str, Any]
) -> GenerationDefaults:
    """End tokens and sampling defaults of a checkpoint.

    End tokens are generation_config.json's, or config.json's where that is silent.  Sampling fields count as
    they stand, under do_sample false too, as in vLLM.  Raises CheckpointError for a value of the wrong type.
    """
    fields = Fields(generation_config or {}, "generation_config.json")
    eos = fields.token_ids("eos_token_id") or Fields(config, "config.json").token_ids("eos_token_id")
    return GenerationDefaults(eos, sampling_from_hf(fields))


def sampling_from_hf(fields: Fields) -> dict[str, Any]:
    """What a generation_config.json says about sampling, in SamplingParams' names; the types are checked."""
    sampling: dict[str, Any] = {}
    for key, name in SAMPLING_KEYS.items():
        if fields.has(key):
            is_count = key in ("top_k", "max_new_tokens")
            sampling[name] = fields.integer(key) if is_count else fields.number(key)
    return sampling


def architecture_of(family: str) -> str:
    """The Hugging Face model class of a family."""
    return next(name for name, architecture in _ARCHITECTURES.items() if architecture.family == family)


def _no_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    del fields
    return (None,) * num_layers


def _mistral_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """One window for all layers.  null means none; a missing key would mean 4096: too easily a mistake."""
    if fields.has("layer_types") and len(set(fields.strings("layer_types"))) > 1:
        raise fields.error("layer_types mixes kinds of attention, which MistralForCausalLM does not have")
    if "sliding_window" not in fields.values:
        raise fields.error("required key sliding_window is missing; null stands for full attention")
    window = _window(fields) if fields.has("sliding_window") else None
    return (window,) * num_layers


def _mixtral_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """One window for all layers, if there is one."""
    return ((_window(fields) if fields.has("sliding_window") else None),) * num_layers


def _qwen3_moe_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """One window for all layers where use_sliding_window says so, whatever max_window_layers says."""
    slides = fields.boolean("use_sliding_window", absent=False)
    return _mixtral_windows(fields, num_layers) if slides else (None,) * num_layers


def _qwen_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """layer_types says which layers slide; before it was invented, all from max_window_layers on did."""
    slides = fields.boolean("use_sliding_window", absent=False) and fields.has("sliding_window")
    if fields.has("layer_types"):
        kinds = fields.strings("layer_types")
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown or len(kinds) != num_layers:
            what = (
                f"the unsupported {unknown[0]!r}"
                if unknown
                else f"{len(kinds)} entries for {num_layers} layers"
            )
            raise fields.error(f"layer_types has {what}; each layer is full_attention or sliding_attention")
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif slides:
        sliding = [layer >= fields.integer("max_window_layers") for layer in range(num_layers)]
    else:
        sliding = [False] * num_layers
    if any(sliding) and not slides:
        raise fields.error(
            "layer_types has sliding_attention, but use_sliding_window or sliding_window is not set"
        )
    return tuple(_window(fields) if slide else None for slide in sliding)


def _window(fields: Fields) -> int:
    return fields.integer("sliding_window", least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """What a Hugging Face model class fixes, and what it makes of a missing key."""

    family: str
    windows: Callable[[Fields, int], tuple[int | None, ...]]
    has_attention_bias: bool = False  # attention_bias puts biases on q, k, v and o
    always_qkv_bias: bool = False
    has_mlp_bias: bool = False
    qk_norm: bool = False
    head_dim_from_hidden: bool = True
    kv_heads_may_be_absent: bool = False
    rope_theta_absent: float | None = None
    experts: Callable[[Fields, int], ExpertsConfig | None] = no_experts
    vision: Callable[[Fields, Fields], VisionConfig | None] = no_vision


_ARCHITECTURES = {
    # Llama's files are the oldest: Llama 1 and 2 know neither rope_theta nor, in part, grouped queries.
    "LlamaForCausalLM": _Architecture(
        family="llama",
        windows=_no_windows,
        has_attention_bias=True,
        has_mlp_bias=True,
        kv_heads_may_be_absent=True,
        rope_theta_absent=10_000.0,
    ),
    "MistralForCausalLM": _Architecture(family="mistral", windows=_mistral_windows),
    "Qwen2ForCausalLM": _Architecture(family="qwen2", windows=_qwen_windows, always_qkv_bias=True),
    "Qwen3ForCausalLM": _Architecture(
        family="qwen3",
        windows=_qwen_windows,
        has_attention_bias=True,
        qk_norm=True,
        head_dim_from_hidden=False,
    ),
    "MixtralForCausalLM": _Architecture(family="mixtral", windows=_mixtral_windows, experts=mixtral_experts),
    "Qwen3MoeForCausalLM": _Architecture(
        family="qwen3_moe",
        windows=_qwen3_moe_windows,
        has_attention_bias=True,
        qk_norm=True,
        experts=qwen3_moe_experts,
    ),
    "Qwen2VLForConditionalGeneration": _Architecture(
        family="qwen2_vl", windows=_qwen_windows, always_qkv_bias=True, vision=qwen2_vl_vision
    ),
    "Qwen2_5_VLForConditionalGeneration": _Architecture(
        family="qwen2_5_vl", windows=_qwen_windows, always_qkv_bias=True, vision=qwen2_5_vl_vision
    ),
}


def _architecture(fields: Fields) -> _Architecture:
    names = fields.strings("architectures")
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    raise fields.error(
        f"architecture {', '.join(names) or '(none given)'} is not supported; "
        f"supported: {', '.join(_ARCHITECTURES)}"
    )
