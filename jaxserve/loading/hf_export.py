"""Writes our own config as a Hugging Face config.json, for checkpoints that came without one."""

from __future__ import annotations

from typing import Any

from jaxserve.config import ModelConfig, RopeScaling
from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.loading.hf_config import architecture_of, model_config_from_hf
from jaxserve.loading.hf_experts import experts_to_hf


def hf_config_of(config: ModelConfig, where: str) -> dict[str, Any]:
    """A config.json that reads back as `config`.

    Raises CheckpointError, naming `where` it came from, if the format cannot say what the config says.
    """
    window = next((window for window in config.layer_windows if window is not None), None)
    written: dict[str, Any] = {
        "architectures": [architecture_of(config.family)],
        "model_type": config.family,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": [
            "full_attention" if layer_window is None else "sliding_attention"
            for layer_window in config.layer_windows
        ],
    }
    if config.experts is not None:
        written |= experts_to_hf(config.experts)
    read_back = model_config_from_hf(written, where)
    if read_back != config:
        names = [name for name in config.__slots__ if getattr(read_back, name) != getattr(config, name)]
        raise CheckpointError(
            f"{where}: a config.json of {written['architectures'][0]} cannot say that "
            + ", ".join(f"{name} is {getattr(config, name)!r}" for name in names)
        )
    return written


def hf_generation_config_of(defaults: GenerationDefaults) -> dict[str, Any]:
    """A generation_config.json with the end tokens of a checkpoint that has no sampling defaults."""
    assert not defaults.sampling, "only Hugging Face directories have these, and a file that says so"
    return {"eos_token_id": list(defaults.eos_token_ids)}


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    values = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention_factor,
    }
    return {name: value for name, value in values.items() if value is not None}
