"""Filtered draws against the sorted float64 reference, token for token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxserve.engine.sampling_rows import MAX_TOP_K, VARIANTS
from jaxserve.sampling_params import SamplingParams
from tests.engine.sampling_reference import kept_tokens, sampled_ids, scores

EDGE = 3e-5  # relative error allowed to float32 probability sums
BATCH = 8  # the same shapes throughout: what takes time here is compiling
LARGE = 20011  # a vocabulary wide enough for group maxima and for the whole-vocabulary paths; odd on purpose


def logits_of_kind(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=size).astype(np.float32)
    if kind == "flat":
        x *= 0.05
    elif kind == "peaked":
        x = x * 2 + 12 * (rng.random(size) < 3 / size)
    elif kind == "tied":
        x = np.round(x * 2)
    elif kind == "negative":
        x = x * 3 - 100
    elif kind == "masked":
        x = np.where(rng.random(size) < 0.9, -np.inf, x * 3)
        x[rng.integers(size)] = 1.0
    elif kind == "one_left":
        keep = rng.integers(size)
        x = np.where(np.arange(size) == keep, x, -np.inf)
    elif kind == "huge":
        x *= 1e4
    elif kind == "zeros":
        x = np.where(rng.random(size) < 0.5, 0.0, -0.0)
    return x.astype(np.float32)


KINDS = ("normal", "flat", "peaked", "tied", "negative", "masked", "one_left", "huge", "zeros")
TIES_BY_THE_HUNDRED = ("tied", "zeros")  # more than 64 groups of 64 tokens have the same largest logit


def check(logits: np.ndarray, params: SamplingParams, position: int, sampled: int) -> None:
    """The sampled token must be kept, and no token that must be kept may have a better score."""
    may, must = kept_tokens(logits, params, EDGE), kept_tokens(logits, params, -EDGE)
    assert may[sampled], (sampled, params)
    s = scores(logits, params, position)
    best = s[must].max()
    assert s[sampled] >= best - 1e-5 * max(1.0, abs(best)), (
        sampled,
        int(np.argmax(np.where(must, s, -np.inf))),
        params,
    )


def mixed_params(rng: np.random.Generator, size: int, seed: int) -> SamplingParams:
    on = rng.random(3) < 0.5
    return SamplingParams(
        seed=seed,
        temperature=float(rng.choice([0.0, 1e-4, 0.1, 0.7, 1.0, 2.0])),
        top_k=int(rng.choice([1, 2, 5, 20, 127, 128, 129, size - 1, size, size + 7])) if on[0] else 0,
        top_p=float(rng.choice([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999])) if on[1] else 1.0,
        min_p=float(rng.choice([1e-4, 0.02, 0.3, 1.0])) if on[2] else 0.0,
    )


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("size", [7, 300, LARGE])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_rows_match_the_sorted_reference(kind, size, on_cpu):
    rng = np.random.default_rng([size, *kind.encode()])
    for call in range(4 if size > 1000 else 12):
        logits = np.stack([logits_of_kind(kind, size, rng) for _ in range(BATCH)])
        params = [mixed_params(rng, size, seed) for seed in range(call * BATCH, (call + 1) * BATCH)]
        positions = rng.integers(0, 10**6, BATCH).tolist()
        ids = sampled_ids(logits, params, positions, on_cpu=on_cpu)
        for row in range(BATCH):
            check(logits[row], params[row], positions[row], int(ids[row]))


def narrow_params(rng: np.random.Generator, seed: int) -> SamplingParams:
    """Parameters that the "top_k" variants take: greedy, or top_k up to MAX_TOP_K."""
    params = mixed_params(rng, LARGE, seed)
    return replace(params, top_k=int(rng.choice([1, 2, 5, 20, 50, MAX_TOP_K - 1, MAX_TOP_K])))


@pytest.mark.parametrize("variant", ["top_k", "full_top_k"])
@pytest.mark.parametrize("size", [300, LARGE])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TIES_BY_THE_HUNDRED])
def test_top_k_alone_draws_as_all_variants_and_as_the_reference(kind, size, variant):
    rng = np.random.default_rng([2, size, *kind.encode()])
    for call in range(4):
        logits = np.stack([logits_of_kind(kind, size, rng) for _ in range(BATCH)])
        params = [narrow_params(rng, seed) for seed in range(call * BATCH, (call + 1) * BATCH)]
        params[call] = SamplingParams(temperature=0, top_p=0.5, seed=1)  # greedy, whatever its top_k
        positions = rng.integers(0, 10**6, BATCH).tolist()
        ids = sampled_ids(logits, params, positions, variant=variant, on_cpu=False)
        np.testing.assert_array_equal(ids, sampled_ids(logits, params, positions, on_cpu=False))
        for row in range(BATCH):
            check(logits[row], params[row], positions[row], int(ids[row]))


@pytest.mark.parametrize("kind", TIES_BY_THE_HUNDRED)
def test_top_k_among_hundreds_of_ties_draws_from_some_of_them(kind):
    """Never a token that top_k drops, and what is larger than the ties competes as ever."""
    rng = np.random.default_rng([3, *kind.encode()])
    logits = np.stack([logits_of_kind(kind, LARGE, rng) for _ in range(BATCH)])
    params = [replace(narrow_params(rng, seed), top_p=1.0) for seed in range(BATCH)]
    ids = sampled_ids(logits, params, variant="top_k", on_cpu=False)
    for row in range(BATCH):
        kept = kept_tokens(logits[row], params[row], EDGE)
        assert kept[ids[row]]
        s = scores(logits[row], params[row], 0)
        larger = kept & (logits[row] > np.sort(logits[row])[-params[row].top_k])
        assert s[ids[row]] >= s[larger].max(initial=-np.inf) - 1e-5


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_combination_of_filters_at_their_boundary(on_cpu):
    """One small row, many draws: exactly the kept tokens turn up."""
    logits = np.log(np.array([0.31, 0.22, 0.22, 0.11, 0.09, 0.05], np.float32))
    for top_k, top_p, min_p in itertools.product(
        (0, 1, 2, 4), (1.0, 0.3, 0.32, 0.76, 0.92), (0.0, 0.2, 0.72)
    ):
        params = [
            SamplingParams(seed=s, temperature=1.5, top_k=top_k, top_p=top_p, min_p=min_p) for s in range(512)
        ]
        ids = sampled_ids(np.tile(logits, (512, 1)), params, on_cpu=on_cpu)
        assert set(ids.tolist()) == set(np.flatnonzero(kept_tokens(logits, params[0])).tolist())


@pytest.mark.parametrize("on_cpu", [True, False])
def test_ties_at_the_edge_stay_together(on_cpu):
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    for top_k, top_p in ((2, 1.0), (0, 0.6)):
        params = [SamplingParams(seed=s, top_k=top_k, top_p=top_p) for s in range(512)]
        assert set(sampled_ids(np.tile(logits, (512, 1)), params, on_cpu=on_cpu).tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", KINDS)
def test_branches_and_straight_line_draw_the_same(kind):
    rng = np.random.default_rng([1, *kind.encode()])
    logits = np.stack([logits_of_kind(kind, LARGE, rng) for _ in range(BATCH)])
    params = [mixed_params(rng, LARGE, seed) for seed in range(BATCH)]
    np.testing.assert_array_equal(
        sampled_ids(logits, params, on_cpu=True), sampled_ids(logits, params, on_cpu=False)
    )


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_takes_the_lowest_id_among_equals(variant, on_cpu):
    logits = np.zeros((BATCH, LARGE), np.float32)
    logits[0, [777, 4000]] = 1
    logits[1, LARGE - 1] = 1
    params = [SamplingParams(seed=1, temperature=0, top_k=5, top_p=0.5)] * BATCH
    ids = sampled_ids(logits, params, variant=variant, on_cpu=on_cpu)
    assert ids.tolist() == [777, LARGE - 1] + [0] * (BATCH - 2)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_row_without_any_allowed_token_gives_a_valid_id(on_cpu):
    logits = np.full((BATCH, LARGE), -np.inf, np.float32)
    params = [
        SamplingParams(seed=1, top_p=0.5, top_k=500, min_p=0.1),
        SamplingParams(seed=1, top_p=0.5),
        SamplingParams(seed=1, top_k=3),
        SamplingParams(seed=1),
    ] * (BATCH // 4)
    assert sampled_ids(logits, params, on_cpu=on_cpu).tolist() == [0] * BATCH
    narrow = [replace(p, top_k=3) for p in params]
    assert sampled_ids(logits, narrow, variant="top_k", on_cpu=on_cpu).tolist() == [0] * BATCH
