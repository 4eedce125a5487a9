"""Searches over the vocabulary against numpy and lax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve.engine import vocab_search


def rows(kind: str, size: int) -> np.ndarray:
    rng = np.random.default_rng([size, *kind.encode()])
    x = rng.normal(size=(5, size)).astype(np.float32)
    if kind == "tied":
        x = np.round(x)
    elif kind == "few":
        x = np.where(rng.random(x.shape) < 0.999, -np.inf, x)
    return x.astype(np.float32)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 5000])
@pytest.mark.parametrize("kind", ["normal", "tied", "few"])
def test_argmax(kind, size, on_cpu):
    x = rows(kind, size)
    np.testing.assert_array_equal(vocab_search.argmax(jnp.asarray(x), on_cpu=on_cpu), x.argmax(-1))


@pytest.mark.parametrize("k", [0, 1, 7, 20])
@pytest.mark.parametrize("kind", ["normal", "tied", "few"])
def test_top_k_is_lax_top_k(kind, k):
    x = jnp.asarray(rows(kind, 5003))
    values, ids = vocab_search.top_k(x, k)
    want_values, want_ids = lax.top_k(x, k)
    np.testing.assert_array_equal(values, want_values)
    is_real = np.isfinite(want_values)  # where a row runs out, any id may stand for -inf
    np.testing.assert_array_equal(np.asarray(ids)[is_real], np.asarray(want_ids)[is_real])
    assert ids.shape == (5, k)
    assert ((ids >= 0) & (ids < 5003)).all()


@pytest.mark.parametrize("size", [64, 5003, 5056])
@pytest.mark.parametrize("kind", ["normal", "tied", "few"])
def test_candidates_hold_the_largest(kind, size):
    x = rows(kind, size)
    k = 9
    values, ids = vocab_search.candidates(jnp.asarray(x), k)
    if ids is None:
        assert size <= 64 * k
        np.testing.assert_array_equal(values, x)
        return
    values, ids = np.asarray(values), np.asarray(ids)
    assert values.shape == ids.shape == (5, 64 * k)
    for row in range(5):
        is_real = ids[row] < size
        np.testing.assert_array_equal(values[row][is_real], x[row][ids[row][is_real]])
        assert (values[row][~is_real] == -np.inf).all()
        assert len(set(ids[row].tolist())) == 64 * k
        np.testing.assert_array_equal(np.sort(values[row])[-k:], np.sort(x[row])[-k:])
        above = np.flatnonzero(x[row] > np.sort(x[row])[-k])
        assert set(above.tolist()) <= set(ids[row].tolist())
        assert x[row].argmax() in ids[row]


def test_a_sliced_top_k_stays_a_top_k_on_cpu():
    def smallest_of_the_largest(x):
        return vocab_search.top_k(x, 8)[0][:, -1]

    text = jax.jit(smallest_of_the_largest).lower(jnp.zeros((2, 8192))).compile().as_text()
    assert text is not None
    assert text.count('custom_call_target="TopK"') == 2


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("kind", ["normal", "tied", "few"])
def test_threshold_of_a_count_is_the_kth_largest_value(kind, on_cpu):
    x = rows(kind, 1000)
    x[0] -= 1000  # one row below, one above zero
    x[1] += 1000
    x[2] = np.where(x[2] > 1, x[2] * 1e30, x[2] * 1e-30)  # large and small
    find = jax.jit(lambda x, k, low: vocab_search.find_threshold(x, None, k, low, on_cpu=on_cpu))
    for k in (1, 2, 37, 999, 1000):
        got = np.asarray(find(x, np.full(5, k, np.float32), np.full(5, -np.inf, np.float32)))
        want = np.sort(x, axis=-1)[:, -k]
        np.testing.assert_array_equal(x >= got[:, None], x >= want[:, None])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_threshold_of_a_mass_starts_from_low(on_cpu):
    x = rows("tied", 500)
    weights = np.round(np.exp(x) * 64).astype(np.float32)  # whole numbers: sums are exact in any order
    low = np.array([-np.inf, -1, 0, 1, 2], np.float32)
    find = jax.jit(
        lambda target: vocab_search.find_threshold(*on_device, target, low_on_device, on_cpu=on_cpu)
    )
    on_device, low_on_device = (jnp.asarray(x), jnp.asarray(weights)), jnp.asarray(low)
    for share in (0.01, 0.5, 0.99, 1.0):
        target = (np.where(x >= low[:, None], weights, 0).sum(-1) * share).astype(np.float32)
        got = np.asarray(find(target))
        for row in range(5):
            candidates = [t for t in np.unique(x[row]) if t >= low[row]]
            want = max(t for t in candidates if weights[row][x[row] >= t].sum() >= target[row])
            np.testing.assert_array_equal(x[row] >= got[row], x[row] >= want)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_threshold_is_low_when_the_target_is_out_of_reach(on_cpu):
    x = jnp.asarray(rows("normal", 100))
    low = jnp.asarray([0.0, -0.5, 1.0, -np.inf, 2.0], jnp.float32)
    got = vocab_search.find_threshold(x, None, jnp.full(5, 1000.0), low, on_cpu=on_cpu)
    np.testing.assert_array_equal(got, low)
