"""GGUF metadata as llama.cpp's converter writes it, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

from jaxserve.config import ExpertsConfig, ModelConfig, RopeScaling
from jaxserve.errors import CheckpointError
from jaxserve.loading.gguf_config import generation_defaults_from_gguf, model_config_from_gguf

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 131072,
    "llama.embedding_length": 2048,
    "llama.feed_forward_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 64,
    "llama.vocab_size": 128256,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "<|im_end|>", "b", "<|im_end|>"],
    "tokenizer.ggml.token_type": [3, 3, 1, 3, 1, 1],
    "tokenizer.ggml.eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {"expert_count": 8, "expert_used_count": 2}
TENSORS = ("token_embd.weight", "output.weight", "blk.0.attn_q.weight")


def read(
    fields: dict[str, Any] | None = None,
    tensors: Collection[str] = TENSORS,
    rope_factors: np.ndarray | None = None,
    **changes: Any,
) -> ModelConfig:
    """`changes` are keys of the architecture, with __ for a dot."""
    fields = dict(LLAMA if fields is None else fields)
    arch = fields["general.architecture"]
    for key, value in changes.items():
        fields[f"{arch}.{key.replace('__', '.')}"] = value
    return model_config_from_gguf(fields, tensors, "m.gguf", rope_factors=rope_factors)


def as_arch(arch: str) -> dict[str, Any]:
    return {
        key.replace("llama.", f"{arch}.", 1): value
        for key, value in LLAMA.items()
        if key.startswith("llama.")
    } | {"general.architecture": arch, "tokenizer.ggml.tokens": LLAMA["tokenizer.ggml.tokens"]}


def llama31_factors(factor: float, theta: float = 500000.0, head_dim: int = 64) -> np.ndarray:
    """What llama.cpp's converter computes for rope_freqs.weight."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = min(max((8192 / wavelength - 1) / 3, 0), 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama() -> None:
    config = read()
    assert config.family == "llama"
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (2, 2048, 8192)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 64)
    assert config.vocab_size == 6
    assert (config.max_position_embeddings, config.rms_norm_eps) == (131072, 1e-5)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, None)
    assert config.layer_windows == (None, None)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False,) * 4


def test_without_tokens_the_key_gives_the_vocabulary() -> None:
    fields = {key: value for key, value in LLAMA.items() if not key.startswith("tokenizer")}
    assert read(fields).vocab_size == 128256


def test_tensors_tell_ties_and_biases() -> None:
    assert not read().tie_word_embeddings
    assert read(tensors=("token_embd.weight",)).tie_word_embeddings
    biased = read(tensors=(*TENSORS, "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_gate.bias"))
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


def test_qwens() -> None:
    qwen2 = read(as_arch("qwen2"), (*TENSORS, "blk.0.attn_q.bias"))
    assert (qwen2.family, qwen2.qkv_bias, qwen2.qk_norm) == ("qwen2", True, False)
    qwen3 = read(
        as_arch("qwen3"), attention__key_length=128, attention__value_length=128, rope__dimension_count=128
    )
    assert (qwen3.family, qwen3.head_dim, qwen3.qk_norm) == ("qwen3", 128, True)


def test_experts() -> None:
    mixtral = read(**EXPERTS)
    assert mixtral.family == "mixtral"
    assert mixtral.experts == ExpertsConfig(
        num_experts=8, num_per_token=2, intermediate_size=8192, renormalize=True, layers=(True, True)
    )
    qwen3 = read(as_arch("qwen3moe"), **EXPERTS, expert_feed_forward_length=768, expert_weights_norm=False)
    assert (qwen3.family, qwen3.qk_norm, qwen3.intermediate_size) == ("qwen3_moe", True, 8192)
    assert qwen3.experts is not None
    assert (qwen3.experts.intermediate_size, qwen3.experts.renormalize) == (768, False)
    with pytest.raises(CheckpointError, match="required key expert_count is missing"):
        read(as_arch("qwen3moe"))
    with pytest.raises(CheckpointError, match="required key expert_feed_forward_length is missing"):
        read(as_arch("qwen3moe"), **EXPERTS)
    with pytest.raises(CheckpointError, match="expert_count is 8; architecture 'qwen3' has no experts"):
        read(as_arch("qwen3"), **EXPERTS)


def test_mistral_is_llama_with_a_window() -> None:
    config = read(attention__sliding_window=4096)
    assert (config.family, config.layer_windows) == ("mistral", (4096, 4096))
    assert read(attention__sliding_window=0).family == "llama"


def test_a_list_of_equal_values_is_one_value() -> None:
    assert read(attention__head_count_kv=[4, 4]).num_kv_heads == 4
    with pytest.raises(CheckpointError, match=r"attention.head_count_kv is \[4, 8\]"):
        read(attention__head_count_kv=[4, 8])


def test_only_llama_may_leave_the_base_out() -> None:
    fields = {key: value for key, value in LLAMA.items() if "rope" not in key and "head_count_kv" not in key}
    config = read(fields)
    assert (config.rope_theta, config.num_kv_heads) == (10000.0, 32)
    qwen2 = {key: value for key, value in as_arch("qwen2").items() if "freq_base" not in key}
    with pytest.raises(CheckpointError, match=r"qwen2.\*: required key rope.freq_base is missing"):
        read(qwen2)


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_key_is_named(key: str) -> None:
    fields = {name: value for name, value in LLAMA.items() if name != f"llama.{key}"}
    with pytest.raises(CheckpointError, match=rf"m.gguf: llama.\*: required key {key} is missing"):
        read(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "required key expert_used_count is missing"),
        (
            {**EXPERTS, "expert_shared_count": 1},
            "expert_shared_count is 1, which is not supported; only 0 is",
        ),
        ({**EXPERTS, "expert_gating_func": 2}, "expert_gating_func is 2, which is not supported; only 1 is"),
        ({**EXPERTS, "expert_weights_scale": 2.5}, "expert_weights_scale is 2.5; only 1 is supported"),
        ({"attention__value_length": 32}, "attention.value_length is 32; only 64"),
        ({"rope__dimension_count": 32}, "rope.dimension_count is 32; only 64"),
        ({"attention__key_length": 63}, "heads are 63 wide"),
        ({"embedding_length": 2050}, "embedding_length 2050 is not a multiple"),
        ({"attention__head_count_kv": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"attention__sliding_window": -1}, "attention.sliding_window is -1"),
        ({"attention__sliding_window_pattern": 6}, "layers of different windows"),
        ({"block_count": "two"}, "block_count is 'two'; it must be a whole number"),
        (
            {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0},
            "rope.scaling.type 'longrope' is not",
        ),
        ({"rope__scaling__factor": 0.5}, "rope.scaling.factor is 0.5; it must be at least 1"),
        ({"rope__scaling__factor": 2.0, "rope__scaling__attn_factor": 1.2}, "attn_factor is 1.2"),
        ({"rope__scaling__attn_factor": 1.2}, "attn_factor is 1.2; without yarn"),
        ({"rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"m.gguf: .*{message}"):
        read(**changes)


def test_unsupported_architecture_is_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"m.gguf: architecture 'gemma3' is not supported; supported: llama, q"
    ):
        read({"general.architecture": "gemma3"})


def test_linear_scaling() -> None:
    expected = RopeScaling("linear", 4.0, 131072)
    assert read(rope__scaling__type="linear", rope__scaling__factor=4.0).rope_scaling == expected
    assert read(rope__scaling__factor=4.0).rope_scaling == expected  # before the type was written
    assert read(rope__scale_linear=4.0).rope_scaling == expected  # and before that
    assert read(rope__scaling__type="none", rope__scaling__factor=4.0).rope_scaling is None
    assert read(rope__scaling__factor=0.0).rope_scaling is None


def test_yarn() -> None:
    config = read(
        context_length=32768,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=32768,
    )
    assert config.max_position_embeddings == 131072
    assert config.rope_scaling == RopeScaling(
        "yarn",
        4.0,
        32768,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=0.1 * math.log(4) + 1.0,
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama31_scaling_is_found_in_its_divisors(factor: float) -> None:
    config = read(tensors=(*TENSORS, "rope_freqs.weight"), rope_factors=llama31_factors(factor))
    assert config.rope_scaling == RopeScaling(
        "llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


def test_other_divisors() -> None:
    tensors = (*TENSORS, "rope_freqs.weight")
    assert read(tensors=tensors, rope_factors=np.ones(32, np.float32)).rope_scaling is None
    with pytest.raises(
        CheckpointError, match=r"rope_freqs.weight \(largest divisor 8\) does not follow Llama 3.1"
    ):
        read(tensors=tensors, rope_factors=np.linspace(1, 8, 32, dtype=np.float32))
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is \[16\], not \[32\]"):
        read(tensors=tensors, rope_factors=llama31_factors(8.0)[:16])
    with pytest.raises(CheckpointError, match=r"'linear' together with rope_freqs.weight"):
        read(tensors=tensors, rope_factors=llama31_factors(8.0), rope__scaling__factor=2.0)


def test_end_tokens() -> None:
    """EOS, and a chat format's own end if it is a control token; the text "<|im_end|>" alone is none."""
    assert generation_defaults_from_gguf(LLAMA).eos_token_ids == (1, 3)
    more = {**LLAMA, "tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 5}
    assert generation_defaults_from_gguf(more).eos_token_ids == (1, 3, 5)
    assert generation_defaults_from_gguf({}).eos_token_ids == ()
    none = {**LLAMA, "tokenizer.ggml.eot_token_id": 2**32 - 1}  # -1 as an unsigned number
    assert generation_defaults_from_gguf(none).eos_token_ids == (1, 3)
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.eos_token_id is 'x'"):
        generation_defaults_from_gguf({"tokenizer.ggml.eos_token_id": "x"})
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.tokens is True; it must be an array of str"):
        generation_defaults_from_gguf({"tokenizer.ggml.tokens": True})
