"""Attention over whole images and within windows, against dense sums."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import bidirectional
from jaxserve.kernels_pallas.bidirectional import Windows, attend_whole, attend_windows

HEADS, SIZE, SCALE = 3, 8, 0.4


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """q, k, v [T, N, H], visible [T, T]; float64."""
    scores = np.einsum("qnh,pnh->nqp", q, k, dtype=np.float64) * SCALE
    weights = np.exp(np.where(visible, scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("nqp,pnh->qnh", weights, v)


@pytest.mark.parametrize("most_scores", [1 << 24, 800, 1])
def test_whole_images(monkeypatch: pytest.MonkeyPatch, most_scores: int) -> None:
    """Of any length, none included, whether scores are computed at once or in blocks of queries."""
    monkeypatch.setattr(bidirectional, "SCORES", most_scores)
    lengths = [24, 1, 0, 17]
    q, k, v = np.random.default_rng(0).normal(size=(3, 4, 24, HEADS, SIZE)).astype(np.float32)
    out = np.asarray(
        attend_whole(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths), SCALE, "xla")
    )
    assert np.isfinite(out).all()
    for row, length in enumerate(lengths):
        there = np.ones((length, length), bool)
        wanted = dense(q[row, :length], k[row, :length], v[row, :length], there)
        np.testing.assert_allclose(out[row, :length], wanted, atol=1e-5)


def test_windows() -> None:
    """Windows that share a block do not see each other, and empty slots are seen by nobody."""
    rng = np.random.default_rng(1)
    window_of = np.array([0, 1, 0, 2, 2, 1, 0, 3])
    qkv = rng.normal(size=(9, 3, HEADS, SIZE)).astype(np.float32)  # the last one is padding
    patches, windows = np.zeros((2, 6), np.int32), np.full((2, 6), -1, np.int32)
    slots = np.zeros(9, np.int32)
    for slot, patch in {0: 0, 1: 2, 2: 6, 4: 1, 5: 5, 6: 3, 7: 4, 9: 7}.items():
        patches.flat[slot], windows.flat[slot], slots[patch] = patch, window_of[patch], slot
    given = Windows(jnp.asarray(patches), jnp.asarray(windows), jnp.asarray(slots))
    out = np.asarray(attend_windows(jnp.asarray(qkv), given, SCALE))
    assert np.isfinite(out).all()
    same = window_of[:, None] == window_of[None]
    q, k, v = np.moveaxis(qkv[:8], 1, 0)
    np.testing.assert_allclose(out[:8], dense(q, k, v, same), atol=1e-5)
