"""Reads the metadata of a GGUF file into our own config."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxserve.config import ExpertsConfig, ModelConfig, RopeScaling
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.loading.fields import MAX_LAYERS, Fields
from jaxserve.loading.gguf_fields import array_of, special_token
from jaxserve.loading.gguf_rope import rope_scaling_from_gguf

_SUPPORTED = ("llama", "qwen2", "qwen3", "qwen3moe")
_CHAT_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")
_SOFTMAX = 1  # expert_gating_func
_CONTROL = 3  # tokenizer.ggml.token_type of a token that stands for no text


def model_config_from_gguf(
    fields: Mapping[str, Any],
    tensor_names: Collection[str],
    where: str,
    *,
    rope_factors: np.ndarray | None = None,
) -> ModelConfig:
    """The numbers in a GGUF file's metadata `fields`, which `where` names in errors.

    `tensor_names` are the file's own ("blk.0.attn_q.bias"): which biases there are and whether the head is
    tied shows only there.  `rope_factors` [H/2] are the values of the tensor rope_freqs.weight, and needed
    where it exists.
    Raises CheckpointError for an unsupported architecture, a missing key or a value that cannot be served.
    """
    general = Fields(fields, where)
    arch = general.string("general.architecture")
    if arch not in _SUPPORTED:
        raise general.error(f"architecture {arch!r} is not supported; supported: {', '.join(_SUPPORTED)}")
    read = Fields(_without_prefix(fields, arch), f"{where}: {arch}.*")
    num_layers = read.integer("block_count", least=1, most=MAX_LAYERS)
    num_heads = _same_in_all_layers(read, "attention.head_count")
    hidden_size = read.integer("embedding_length", least=1)
    head_dim = _head_dim(read, hidden_size, num_heads)
    kv_heads = "attention.head_count_kv"
    window = _window(read)
    theta = read.number("rope.freq_base", absent=10_000.0 if arch == "llama" else None)
    if theta <= 1:
        raise read.error(f"rope.freq_base is {theta}; it must be above 1")
    assert rope_factors is not None or "rope_freqs.weight" not in tensor_names, "rope_factors were not given"
    try:
        scaling = rope_scaling_from_gguf(read, theta, head_dim, rope_factors)
        experts = _experts(read, arch, num_layers)
        return ModelConfig(
            family=_family(arch, experts, window),
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=_same_in_all_layers(read, "feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=_same_in_all_layers(read, kv_heads) if read.has(kv_heads) else num_heads,
            head_dim=head_dim,
            vocab_size=_vocab_size(general, read),
            max_position_embeddings=_context(read, scaling),
            rms_norm_eps=read.number("attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings="output.weight" not in tensor_names,
            layer_windows=(window,) * num_layers,
            qkv_bias="blk.0.attn_q.bias" in tensor_names,
            o_bias="blk.0.attn_output.bias" in tensor_names,
            mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
            qk_norm=arch in ("qwen3", "qwen3moe"),
            hidden_act="silu",
            experts=experts,
            vision=None,
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def generation_defaults_from_gguf(fields: Mapping[str, Any]) -> GenerationDefaults:
    """End tokens: those of text, turn and message that the metadata gives, and the chat formats' own by name.

    Raises CheckpointError for an id that is none.
    """
    named = [special_token(fields, role) for role in ("eos", "eot", "eom")]
    ids = [token_id for token_id in named if token_id is not None]
    # Some converters name only the end of text as EOS, though the chat template ends turns otherwise.
    tokens = array_of(fields, "tokenizer.ggml.tokens", str)
    types = array_of(fields, "tokenizer.ggml.token_type", int)
    ids += [
        token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in _CHAT_END_TOKENS
    ]
    return GenerationDefaults(tuple(dict.fromkeys(ids)))


def _family(arch: str, experts: ExpertsConfig | None, window: int | None) -> str:
    """llama.cpp converts Mistral and Mixtral to the architecture "llama"; without a window Mistral is the same."""
    if arch == "llama":
        return "mixtral" if experts else "mistral" if window else arch
    return "qwen3_moe" if arch == "qwen3moe" else arch


def _experts(read: Fields, arch: str, num_layers: int) -> ExpertsConfig | None:
    """Those of all layers: llama.cpp knows no layer without in these architectures."""
    if arch != "qwen3moe":
        count = read.integer("expert_count", absent=0)
        if count == 0:
            return None
        if arch != "llama":
            raise read.error(f"expert_count is {count}; architecture {arch!r} has no experts")
    for key, plain in (("expert_shared_count", 0), ("expert_gating_func", _SOFTMAX)):
        if read.integer(key, absent=plain) != plain:
            raise read.error(f"{key} is {read.values[key]}, which is not supported; only {plain} is")
    if read.number("expert_weights_scale", absent=1.0) not in (0.0, 1.0):  # 0: that there is none
        raise read.error(
            f"expert_weights_scale is {read.values['expert_weights_scale']}; only 1 is supported"
        )
    return ExpertsConfig(
        num_experts=read.integer("expert_count", least=1),
        num_per_token=read.integer("expert_used_count", least=1),
        intermediate_size=_same_in_all_layers(
            read, "feed_forward_length" if arch == "llama" else "expert_feed_forward_length"
        ),
        renormalize=read.boolean("expert_weights_norm", absent=True),
        layers=(True,) * num_layers,
    )


def _without_prefix(fields: Mapping[str, Any], arch: str) -> dict[str, Any]:
    prefix = f"{arch}."
    return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}


def _same_in_all_layers(read: Fields, key: str) -> int:
    """The format allows a list with an entry a layer; our models have one value for all."""
    value = read.values.get(key)
    if not isinstance(value, list):
        return read.integer(key, least=1)
    if not value or any(item != value[0] for item in value):
        raise read.error(f"{key} is {value!r}; a model whose layers differ is not supported")
    return Fields({key: value[0]}, read.where).integer(key, least=1)


def _head_dim(read: Fields, hidden_size: int, num_heads: int) -> int:
    if read.has("attention.key_length"):
        head_dim = read.integer("attention.key_length", least=1)
    elif hidden_size % num_heads:
        raise read.error(
            f"embedding_length {hidden_size} is not a multiple of attention.head_count {num_heads}"
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise read.error(f"heads are {head_dim} wide; rotary embeddings need an even width")
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.integer(key, absent=head_dim) != head_dim:
            raise read.error(
                f"{key} is {read.values[key]}; only {head_dim}, the width of a head, is supported"
            )
    return head_dim


def _window(read: Fields) -> int | None:
    """The window of every layer.  0 is how converters write that there is none."""
    if read.has("attention.sliding_window_pattern"):
        raise read.error(
            "attention.sliding_window_pattern is set: layers of different windows are not supported"
        )
    return read.integer("attention.sliding_window", absent=0, least=0) or None


def _vocab_size(general: Fields, read: Fields) -> int:
    tokens = array_of(general.values, "tokenizer.ggml.tokens", str)
    return len(tokens) if tokens else read.integer("vocab_size", least=1)


def _context(read: Fields, scaling: RopeScaling | None) -> int:
    context = read.integer("context_length", least=1)
    if scaling is None or scaling.kind != "yarn":
        return context
    return max(context, int(scaling.original_max_position_embeddings * scaling.factor))
