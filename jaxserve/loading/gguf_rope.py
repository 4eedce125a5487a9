"""Reads the rope scaling of a GGUF file."""

from __future__ import annotations

import numpy as np

from jaxserve.config import RopeScaling
from jaxserve.loading.fields import Fields
from jaxserve.models.rope_frequencies import llama3_frequencies, plain_frequencies, yarn_attention_factor

# The only numbers that Llama 3.1 and its successors were published with; the factor is 8 or 32.
_LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0


def rope_scaling_from_gguf(
    read: Fields, theta: float, head_dim: int, rope_factors: np.ndarray | None
) -> RopeScaling | None:
    """The scaling that keys rope.scaling.* and the divisors of the tensor rope_freqs.weight [H/2] amount to.

    Raises CheckpointError for one that is not supported, and for divisors that do not follow Llama 3.1's
    scheme.
    """
    for key, plain in (
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
        ("rope.scaling.alpha", 0.0),
    ):
        if read.number(key, absent=plain) != plain:
            raise read.error(f"{key} is {read.values[key]}, which is not supported; only {plain} is")
    scaling = _from_keys(read)
    if rope_factors is None or bool(np.all(rope_factors == 1)):
        return scaling
    if scaling is not None:
        raise read.error(
            f"rope.scaling.type {scaling.kind!r} together with rope_freqs.weight is not supported"
        )
    return _from_factors(read, theta, head_dim, rope_factors)


def _from_keys(read: Fields) -> RopeScaling | None:
    # Files from before rope.scaling.type have the factor alone, and even older ones rope.scale_linear.
    factor_key = "rope.scaling.factor" if read.has("rope.scaling.factor") else "rope.scale_linear"
    factor = read.number(factor_key, absent=0.0) or 1.0  # 0 is how converters write that there is none
    kind = read.string("rope.scaling.type", absent="linear")
    attention = read.number("rope.scaling.attn_factor", absent=1.0)
    attention *= read.number("rope.scaling.yarn_attn_factor", absent=1.0)
    if kind == "none" or (kind == "linear" and factor == 1):
        if attention != 1:
            raise read.error(f"rope.scaling.attn_factor is {attention}; without yarn only 1 is supported")
        return None
    if factor < 1:
        raise read.error(f"{factor_key} is {factor}; it must be at least 1")
    context = read.integer("context_length", least=1)
    if kind == "linear":
        if attention != 1:
            raise read.error(f"rope.scaling.attn_factor is {attention}; without yarn only 1 is supported")
        return RopeScaling("linear", factor, context)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            read.integer("rope.scaling.original_context_length", absent=context, least=1),
            beta_fast=read.number("rope.scaling.yarn_beta_fast", absent=32.0),  # llama.cpp's, and the paper's
            beta_slow=read.number("rope.scaling.yarn_beta_slow", absent=1.0),
            attention_factor=attention * yarn_attention_factor(factor),
        )
    raise read.error(f"rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")


def _from_factors(read: Fields, theta: float, head_dim: int, rope_factors: np.ndarray) -> RopeScaling:
    """The converter keeps only what each frequency is divided by: try whether Llama 3.1's scheme gives it."""
    if rope_factors.shape != (head_dim // 2,):
        raise read.error(
            f"rope_freqs.weight is {list(rope_factors.shape)}, not [{head_dim // 2}], half a head"
        )
    factor = float(rope_factors.max())  # that of the longest waves
    scaling = RopeScaling(
        "llama3", factor, _LLAMA3_CONTEXT, low_freq_factor=_LLAMA3_LOW, high_freq_factor=_LLAMA3_HIGH
    )
    plain = plain_frequencies(theta, head_dim)
    if not np.allclose(plain / llama3_frequencies(plain, scaling), rope_factors, rtol=1e-4, atol=0):
        raise read.error(
            f"rope_freqs.weight (largest divisor {factor:g}) does not follow Llama 3.1's scheme "
            f"(original context {_LLAMA3_CONTEXT}, factors {_LLAMA3_LOW:g} and {_LLAMA3_HIGH:g}); "
            "no other is supported"
        )
    return scaling
