"""The angular frequencies of rotary position embeddings, plain and stretched."""

from __future__ import annotations

import math

import numpy as np

from jaxserve.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians a position adds to each rotated pair, [H/2] float32, and the factor on cos and sin.

    The arithmetic is float32 in the order of the models' reference code: those are the frequencies they were
    trained with, and at position 100,000 one unit in the last place already turns a pair by 0.01 radians.
    """
    frequencies = plain_frequencies(config.rope_theta, config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor), 1.0
    if scaling.kind == "llama3":
        return llama3_frequencies(frequencies, scaling), 1.0
    return _yarn(config.rope_theta, config.head_dim, scaling)


def plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """theta ** (-2i / H) for i = 0 .. H/2 - 1, [H/2] float32."""
    return np.float32(1) / _wavelengths_over_2pi(theta, head_dim)


def llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's scheme for [H/2]: long waves slowed by `factor`, short ones kept, interpolated between."""
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    factor, context = np.float32(scaling.factor), np.float32(scaling.original_max_position_embeddings)
    waves_in_context = context / (np.float32(2 * math.pi) / frequencies)
    kept = np.clip((waves_in_context - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / factor + kept * frequencies).astype(np.float32)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cos and sin with where the checkpoint does not say: 0.1 ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _wavelengths_over_2pi(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(theta) ** exponents


def _yarn(theta: float, head_dim: int, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """arXiv:2309.00071, section 3.2: pairs that turn often keep their frequency, slow ones are stretched."""
    assert scaling.beta_fast is not None
    assert scaling.beta_slow is not None
    assert scaling.attention_factor is not None
    context = scaling.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
    width = np.float32(last - first) if last != first else np.float32(0.001)  # as the reference avoids 0 / 0
    interpolated = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / width, 0, 1)
    wavelengths = _wavelengths_over_2pi(theta, head_dim)
    slow, fast = 1 / (np.float32(scaling.factor) * wavelengths), 1 / wavelengths
    return (slow * interpolated + fast * (1 - interpolated)).astype(np.float32), scaling.attention_factor
