"""The noise: reproducible, independent of everything but seed, position and token, and Gumbel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from jaxserve.engine.sampling_noise import gumbel, row_keys
from jaxserve.sampling_params import SamplingParams
from tests.engine.sampling_reference import kept_tokens, sampled_ids


def test_row_keys_are_threefry():
    rng = np.random.default_rng(0)
    lo, hi, position = (jnp.asarray(rng.integers(0, 2**32, 20, np.uint32)) for _ in range(3))
    got = np.stack(row_keys(lo, hi, position), 1)
    for row in range(20):
        want = threefry_2x32(jnp.stack([lo[row], hi[row]]), jnp.stack([position[row], jnp.uint32(0)]))
        np.testing.assert_array_equal(got[row], want)


def keys_of(rng: np.random.Generator, count: int) -> tuple[jax.Array, jax.Array]:
    first, second = rng.integers(0, 2**32, (2, count), np.uint32)
    return jnp.asarray(first), jnp.asarray(second)


@pytest.mark.parametrize("along", ["tokens", "keys"])
def test_noise_is_gumbel(along):
    rng = np.random.default_rng(1)
    shape = (4, 500_000) if along == "tokens" else (500_000, 4)
    noise = np.asarray(gumbel(keys_of(rng, shape[0]), jnp.arange(shape[1])[None])).ravel()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 1e-4
    for height in (6.0, 9.0, 11.0):  # the tail decides what improbable tokens get
        expected = noise.size * stats.gumbel_r.sf(height)
        assert abs((noise > height).sum() - expected) < 4 * np.sqrt(expected)


def test_noise_does_not_correlate_across_tokens_positions_or_seeds():
    steps = jnp.arange(64, dtype=jnp.uint32)
    zeros = jnp.zeros_like(steps)
    for words in ((zeros, zeros, steps), (steps, zeros, zeros), (zeros, steps, zeros)):
        noise = np.asarray(gumbel(row_keys(*words), jnp.arange(4096)[None]))
        correlation = np.corrcoef(noise)[~np.eye(64, dtype=bool)]
        assert np.abs(correlation).max() < 5.5 / np.sqrt(4096)
        lagged = [
            np.corrcoef(noise[:, :-lag].ravel(), noise[:, lag:].ravel())[0, 1] for lag in (1, 2, 64, 1024)
        ]
        assert np.abs(lagged).max() < 5 / np.sqrt(noise.size * 0.75)


def test_noise_of_a_token_is_the_same_wherever_it_stands():
    keys = keys_of(np.random.default_rng(2), 3)
    whole = np.asarray(gumbel(keys, jnp.arange(1000)[None]))
    ids = np.random.default_rng(3).integers(0, 1000, (3, 50))
    np.testing.assert_array_equal(
        np.asarray(gumbel(keys, jnp.asarray(ids))), np.take_along_axis(whole, ids, 1)
    )


def chi_square(ids: np.ndarray, probs: np.ndarray) -> float:
    counts = np.bincount(ids, minlength=len(probs))
    assert not counts[probs == 0].any()
    return float(stats.chisquare(counts[probs > 0], probs[probs > 0] * len(ids)).pvalue)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    ("filters", "variant"),
    [
        ({}, "temperature"),
        ({}, "random"),
        ({"top_k": 12}, "random"),
        ({"top_p": 0.8, "min_p": 0.02}, "random"),
    ],
)
def test_tokens_follow_the_distribution(filters, variant, vary, on_cpu):
    logits = np.random.default_rng(4).normal(size=40).astype(np.float32)
    count = 20_000
    seeds = range(count) if vary == "seed" else [11] * count
    positions = list(range(count)) if vary == "position" else [0] * count
    params = [SamplingParams(seed=s, temperature=0.8, **filters) for s in seeds]
    ids = sampled_ids(np.tile(logits, (count, 1)), params, positions, variant=variant, on_cpu=on_cpu)
    probs = np.where(kept_tokens(logits, params[0]), np.exp(logits.astype(np.float64) / 0.8), 0)
    assert chi_square(ids, probs / probs.sum()) > 1e-4


def test_a_long_improbable_tail_is_drawn_as_often_as_it_should():
    """20,000 tokens of probability 5e-7 each beside one of 0.99: the tail wins in 1 of 100 draws."""
    size, count = 20_001, 2_000
    logits = np.zeros(size, np.float32)
    logits[0] = np.log(0.99 / 0.01 * (size - 1))
    params = [SamplingParams(seed=s) for s in range(count)]
    ids = np.concatenate(
        [
            sampled_ids(np.tile(logits, (200, 1)), params[i : i + 200], variant="temperature")
            for i in range(0, count, 200)
        ]
    )
    assert stats.binomtest(int((ids != 0).sum()), count, 0.01).pvalue > 1e-3
