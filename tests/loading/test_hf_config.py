"""config.json of every supported architecture, in old and new layouts, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jaxserve.config import ExpertsConfig, RopeScaling
from jaxserve.errors import CheckpointError
from jaxserve.loading.hf_config import generation_defaults_from_hf, model_config_from_hf
from tests.loading.published import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, TEXT


def read(config: dict[str, Any], **changes: Any) -> Any:
    return model_config_from_hf({**config, **changes}, "config.json")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_llama() -> None:
    config = read(LLAMA)
    assert config.family == "llama"
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (32, 4096, 14336)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert (config.vocab_size, config.max_position_embeddings) == (128256, 131072)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 500000.0)
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert config.layer_windows == (None,) * 32
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False,) * 4
    assert not config.tie_word_embeddings


def test_biases_and_ties() -> None:
    config = read(LLAMA, attention_bias=True, tie_word_embeddings=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    assert config.tie_word_embeddings
    assert read(LLAMA, mlp_bias=True).mlp_bias


def test_llama_2_lacks_what_was_not_invented() -> None:
    old = without(
        LLAMA,
        "num_key_value_heads",
        "rope_theta",
        "rope_scaling",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
    )
    config = read(old)
    assert (config.num_kv_heads, config.rope_theta, config.rope_scaling) == (32, 10000.0, None)
    assert (config.qkv_bias, config.mlp_bias, config.tie_word_embeddings) == (False, False, False)


def test_mistral_windows() -> None:
    assert read(MISTRAL).layer_windows == (4096,) * 32
    assert read(MISTRAL, sliding_window=None).layer_windows == (None,) * 32
    with pytest.raises(CheckpointError, match="sliding_window is missing; null stands for full"):
        read(without(MISTRAL, "sliding_window"))
    with pytest.raises(CheckpointError, match="sliding_window is 0"):
        read(MISTRAL, sliding_window=0)
    with pytest.raises(CheckpointError, match="layer_types mixes"):
        read(MISTRAL, layer_types=["full_attention", "sliding_attention"] * 16)


def test_qwen2() -> None:
    config = read(QWEN2)
    assert (config.family, config.head_dim, config.rope_theta) == ("qwen2", 128, 1000000.0)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)
    assert config.layer_windows == (None,) * 28


def test_qwen_windows() -> None:
    slides = {"use_sliding_window": True, "sliding_window": 512, "num_hidden_layers": 4}
    assert read(QWEN2, **slides, max_window_layers=3).layer_windows == (None, None, None, 512)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert read(QWEN3, **slides, layer_types=kinds).layer_windows == (512, None, 512, None)
    assert read(QWEN2, **slides | {"sliding_window": None}).layer_windows == (None,) * 4
    with pytest.raises(CheckpointError, match="max_window_layers is missing"):
        read(without(QWEN2, "max_window_layers"), **slides)
    with pytest.raises(CheckpointError, match="layer_types has 2 entries for 4 layers"):
        read(QWEN2, **slides, layer_types=kinds[:2])
    with pytest.raises(CheckpointError, match="unsupported 'chunked_attention'"):
        read(QWEN2, **slides, layer_types=["chunked_attention", *kinds[1:]])
    with pytest.raises(CheckpointError, match="use_sliding_window or sliding_window is not set"):
        read(QWEN2, num_hidden_layers=4, layer_types=kinds)


def test_qwen3() -> None:
    config = read(QWEN3)
    assert (config.family, config.head_dim, config.qk_norm) == ("qwen3", 128, True)
    assert (config.qkv_bias, config.tie_word_embeddings) == (False, True)
    assert read(QWEN3, attention_bias=True).qkv_bias
    with pytest.raises(CheckpointError, match="required key head_dim is missing"):
        read(without(QWEN3, "head_dim"))


def test_mixtral() -> None:
    config = read(MIXTRAL)
    assert (config.family, config.head_dim, config.layer_windows) == ("mixtral", 128, (None,) * 32)
    assert config.experts == ExpertsConfig(
        num_experts=8, num_per_token=2, intermediate_size=14336, renormalize=True, layers=(True,) * 32
    )
    assert read(MIXTRAL, sliding_window=4096).layer_windows == (4096,) * 32
    assert read(without(MIXTRAL, "sliding_window")) == config


def test_qwen3_moe() -> None:
    config = read(QWEN3_MOE)
    assert (config.family, config.head_dim, config.qk_norm) == ("qwen3_moe", 128, True)
    assert config.experts == ExpertsConfig(
        num_experts=128, num_per_token=8, intermediate_size=768, renormalize=True, layers=(True,) * 48
    )
    renamed = without(QWEN3_MOE, "num_experts", "mlp_only_layers")
    assert read(renamed, num_local_experts=128, mlp_only_layers=None) == config
    assert read(without(QWEN3_MOE, "head_dim")).head_dim == 64
    assert read(QWEN3_MOE, use_sliding_window=True, sliding_window=99).layer_windows == (99,) * 48
    assert not read(QWEN3_MOE, norm_topk_prob=False).experts.renormalize


def test_some_layers_have_no_experts() -> None:
    layers = read(QWEN3_MOE, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]).experts.layers
    assert layers == (False, True, False, False, False, True)
    with pytest.raises(CheckpointError, match="decoder_sparse_step is 0"):
        read(QWEN3_MOE, decoder_sparse_step=0)
    with pytest.raises(
        CheckpointError, match=r"mlp_only_layers is \['3'\]; it must be a list of whole numbers"
    ):
        read(QWEN3_MOE, mlp_only_layers=["3"])


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (MIXTRAL, "num_local_experts"),
        (MIXTRAL, "num_experts_per_tok"),
        (QWEN3_MOE, "num_experts"),
        (QWEN3_MOE, "num_experts_per_tok"),
        (QWEN3_MOE, "moe_intermediate_size"),
        (QWEN3_MOE, "norm_topk_prob"),
        (QWEN3_MOE, "decoder_sparse_step"),
    ],
)
def test_what_experts_need_to_know_is_asked_for(config: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f"required key {key} is missing"):
        read(without(config, key))


def test_more_experts_a_token_than_there_are() -> None:
    with pytest.raises(CheckpointError, match=r"config.json: .*9 experts a token, but there are 8"):
        read(MIXTRAL, num_experts_per_tok=9)


@pytest.mark.parametrize("config", TEXT, ids=lambda config: config["architectures"][0])
def test_transformers_5_layout_means_the_same(config: dict[str, Any]) -> None:
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    parameters = {**scaling, "rope_theta": config["rope_theta"]}
    assert read(without(config, "rope_theta", "rope_scaling"), rope_parameters=parameters) == read(config)


@pytest.mark.parametrize("config", TEXT, ids=lambda config: config["architectures"][0])
@pytest.mark.parametrize(
    "key",
    [
        "architectures",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "vocab_size",
    ],
)
def test_missing_key_is_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: required key {key} is missing"):
        read(without(config, key))


@pytest.mark.parametrize("config", [MISTRAL, QWEN2, QWEN3], ids=["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("key", ["rope_theta", "num_key_value_heads"])
def test_newer_architectures_always_say(config: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        read(without(config, key))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported; supported: Llama",
        ),
        ({"architectures": []}, r"\(none given\) is not supported"),
        (
            {"architectures": "LlamaForCausalLM"},
            "architectures is 'LlamaForCausalLM'; it must be a list of strings",
        ),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True; it must be a whole number"),
        ({"hidden_size": 4100}, "hidden_size 4100 is not a multiple of num_attention_heads 32"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({"head_dim": 63}, "head_dim is 63; rotary embeddings need an even one"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; it must be a number"),
        ({"rope_theta": 0}, "rope_theta is 0.0; it must be above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; supp",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: required key factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; it must be at least 1"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; one object for all layers"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "one object for all layers is supported",
        ),
        (
            {"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}},
            "low_freq_factor is 1.0 and high_freq_factor 1.0",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        read(LLAMA, **changes)


@pytest.mark.parametrize("key", ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_llama3_scaling_is_complete(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"rope_scaling: required key {key} is missing"):
        read(LLAMA, rope_scaling=without(LLAMA["rope_scaling"], key))


def test_linear_scaling_keeps_the_context() -> None:
    config = read(LLAMA, rope_scaling={"type": "linear", "factor": 4}, max_position_embeddings=16384)
    assert config.rope_scaling == RopeScaling("linear", 4.0, 16384)
    assert config.max_position_embeddings == 16384


def test_yarn_as_qwen_switches_it_on() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(QWEN2, rope_scaling=scaling)
    assert config.max_position_embeddings == 131072
    assert config.rope_scaling == RopeScaling(
        "yarn",
        4.0,
        32768,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=0.1 * math.log(4) + 1.0,
    )


def test_yarn_by_its_other_keys() -> None:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16, "beta_slow": 2}
    config = read(QWEN2, rope_scaling={**scaling, "attention_factor": 1.5})
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position_embeddings == 32768
    assert (config.rope_scaling.beta_fast, config.rope_scaling.beta_slow) == (16.0, 2.0)
    assert config.rope_scaling.attention_factor == 1.5
    by_mscale = read(QWEN2, rope_scaling={**scaling, "mscale": 1.0, "mscale_all_dim": 0.5}).rope_scaling
    assert by_mscale is not None
    log = math.log(2)
    assert by_mscale.attention_factor == pytest.approx((0.1 * log + 1) / (0.05 * log + 1))
    with pytest.raises(CheckpointError, match="truncate is false"):
        read(QWEN2, rope_scaling={**scaling, "truncate": False})


def test_generation_config_wins_over_config() -> None:
    generation = {
        "bos_token_id": 1,
        "do_sample": False,
        "eos_token_id": [7, 8],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": None,
        "max_new_tokens": 2048,
    }
    defaults = generation_defaults_from_hf(generation, {"eos_token_id": 9})
    assert defaults.eos_token_ids == (7, 8)
    assert defaults.sampling == {"temperature": 0.6, "top_k": 20, "max_tokens": 2048}


def test_without_generation_config() -> None:
    assert generation_defaults_from_hf(None, {"eos_token_id": 2}).eos_token_ids == (2,)
    assert generation_defaults_from_hf({"eos_token_id": None}, {"eos_token_id": 2}).eos_token_ids == (2,)
    assert generation_defaults_from_hf(None, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "</s>"}, "generation_config.json: eos_token_id is '</s>'"),
        ({"eos_token_id": [2, -1]}, "eos_token_id is"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
    ],
)
def test_wrong_generation_config(generation: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        generation_defaults_from_hf(generation, {})
