"""Rotary frequencies by the published formulas, and the rotation by complex numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import RopeScaling
from jaxserve.kernels_pallas.heads import rotate
from jaxserve.models.rope import rope_table
from jaxserve.models.rope_frequencies import rope_frequencies, yarn_attention_factor
from tests.models.golden import read_golden

CONFIG = replace(read_golden("llama").checkpoint.config, head_dim=64, rope_theta=500_000.0)
LLAMA3 = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling("yarn", 4.0, 32_768, beta_fast=32.0, beta_slow=1.0, attention_factor=1.25)


def plain(theta: float = 500_000.0, head_dim: int = 64) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def test_plain() -> None:
    frequencies, factor = rope_frequencies(CONFIG)
    assert frequencies.dtype == np.float32
    assert factor == 1
    np.testing.assert_allclose(frequencies, plain(), rtol=1e-6)


def test_linear_divides_all() -> None:
    frequencies, factor = rope_frequencies(replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0, 4096)))
    assert factor == 1
    np.testing.assert_allclose(frequencies, np.array(plain()) / 4, rtol=1e-6)


def test_llama3_follows_the_reference_code() -> None:
    """The loop of Llama 3.1's apply_scaling, with its three branches."""
    expected = []
    for frequency in plain():
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    frequencies, factor = rope_frequencies(replace(CONFIG, rope_scaling=LLAMA3))
    assert factor == 1
    np.testing.assert_allclose(frequencies, expected, rtol=1e-5)
    ratios = plain() / frequencies
    assert ratios.min() == pytest.approx(1)
    assert ratios.max() == pytest.approx(8)
    assert any(1.01 < ratio < 7.9 for ratio in ratios)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    frequencies, factor = rope_frequencies(replace(CONFIG, rope_scaling=YARN))
    assert factor == 1.25
    ratios = plain() / frequencies
    turns = 32_768 / (2 * math.pi / np.array(plain()))  # in the original context
    np.testing.assert_allclose(ratios[turns > 64], 1, rtol=1e-5)
    np.testing.assert_allclose(ratios[turns < 0.5], 4, rtol=1e-5)
    assert np.all(np.diff(ratios) > -1e-5)
    assert np.any((ratios > 1.1) & (ratios < 3.9))


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_attention_factor(0.5) == 1
    assert yarn_attention_factor(4.0, 2.0) == pytest.approx(0.2 * math.log(4) + 1)


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN])
def test_rotation_is_a_complex_product(scaling: RopeScaling | None) -> None:
    config = replace(CONFIG, rope_scaling=scaling)
    positions = np.array([0, 1, 7, 4000], np.int32)
    x = np.random.default_rng(0).normal(size=(4, 3, 64)).astype(np.float32)
    frequencies, factor = rope_frequencies(config)
    angles = positions[:, None, None] * frequencies.astype(np.float64)
    turned = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * angles) * factor
    got = rotate(jnp.asarray(x), rope_table(jnp.asarray(positions), config))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-3)
    np.testing.assert_allclose(got[:3], np.concatenate([turned.real, turned.imag], -1)[:3], atol=1e-5)


def test_scores_depend_on_distance_alone() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 64))

    def score(query_position: int, key_position: int) -> float:
        table = rope_table(jnp.array([query_position]), CONFIG), rope_table(jnp.array([key_position]), CONFIG)
        return float(jnp.sum(rotate(q, table[0]) * rotate(k, table[1])))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-3)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_bfloat16_is_rotated_in_float32() -> None:
    x = jax.random.normal(jax.random.key(1), (1, 2, 64), jnp.bfloat16)
    table = rope_table(jnp.array([1001]), CONFIG)
    got = rotate(x, table)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rotate(x.astype(jnp.float32), table).astype(jnp.bfloat16))
