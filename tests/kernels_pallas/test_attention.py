"""Paged attention against the reference, and its lowering for machines that are not here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import reference
from jaxserve.kernels_pallas.attention import attention, start_step
from jaxserve.kernels_pallas.scoring import Scoring
from tests.kernels_pallas.layouts import Step, cast, make_step, packed, unturned
from tests.kernels_pallas.lowering import lower_for

CASES: dict[str, dict[str, Any]] = {
    "one decode": {"sequences": [(20, 1)], "decode": True},
    "first token of all": {"sequences": [(0, 1)], "decode": True},
    "ragged decodes, padding": {
        "sequences": [(5, 1), (130, 1), (63, 1), (64, 1)],
        "decode": True,
        "padding": 4,
    },
    "more decodes than a group": {"sequences": [(n * 7, 1) for n in range(11)], "decode": True, "padding": 5},
    "one prompt": {"sequences": [(0, 13)]},
    "full last page": {"sequences": [(0, 16)], "padding": 3},
    "a chunk behind a cached prefix": {"sequences": [(24, 9)], "padding": 7},
    "decodes and chunks": {
        "sequences": [(40, 1), (7, 1), (0, 10), (300, 6)],
        "padding": 2,
        "padding_rows": 3,
    },
    "one head group": {"sequences": [(9, 1), (0, 5)], "num_heads": 4, "num_kv_heads": 4},
    "one kv head": {"sequences": [(9, 1), (0, 5)], "num_heads": 8, "num_kv_heads": 1},
    "wide heads, large pages": {
        "sequences": [(70, 1), (30, 9)],
        "head_dim": 128,
        "page_size": 32,
        "tile_size": 8,
    },
    "head_dim 80": {"sequences": [(17, 1)], "decode": True, "head_dim": 80, "page_size": 16},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 11},
    "soft cap": {"soft_cap": 2.0},
    "both": {"window": 3, "soft_cap": 5.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(case: dict[str, Any], options: dict[str, Any]) -> None:
    step = make_step(**case)
    scoring = Scoring(step.q.shape[-1] ** -0.5, **options)
    want, want_pages = reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, scoring)
    out, pages = run(step, scoring)
    np.testing.assert_allclose(out[: step.num_live], want[: step.num_live], atol=2e-5)
    assert np.isfinite(out).all()
    # Page 0 takes what padding tokens write.
    np.testing.assert_array_equal(pages[1:], want_pages[1:])


def test_bfloat16_is_computed_wide_and_rounded_once() -> None:
    step = cast(make_step([(50, 1), (0, 9)]), jnp.bfloat16)
    want, _ = reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, Scoring(0.25))
    out, _ = run(step, Scoring(0.25))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32)[: step.num_live], want[: step.num_live].astype(np.float32), atol=0.02
    )


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("page_dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float16])
def test_narrow_pages_are_read_wide_and_cut_off_what_they_cannot_hold(page_dtype: Any, decode: bool) -> None:
    step = make_step([(50, 1), (9, 1 if decode else 7)], decode=decode)
    step = replace(step, kv_pages=step.kv_pages.astype(page_dtype))
    step.k[1, 0, 3], step.v[1, 1, 5] = 3e5, -np.inf
    want, want_pages = reference.paged_attention(
        step.q, step.k, step.v, step.kv_pages, step.meta, Scoring(0.25)
    )
    out, pages = run(step, Scoring(0.25))
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(pages.astype(np.float32)[1:], want_pages.astype(np.float32)[1:])
    assert np.isfinite(pages.astype(np.float32)[1:]).all()


@pytest.mark.parametrize(
    ("page_dtype", "error"), [(jnp.float8_e4m3fn, 0.02), (jnp.float8_e5m2, 0.04), (jnp.float16, 2e-4)]
)
def test_narrow_pages_cost_a_little(page_dtype: Any, error: float) -> None:
    step = make_step([(300, 1), (90, 20), (0, 60)], head_dim=64)
    scoring = Scoring(0.125)
    want, _ = reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, scoring)
    out, _ = run(replace(step, kv_pages=step.kv_pages.astype(page_dtype)), scoring)
    assert error / 4 < np.sqrt(np.mean((out - want) ** 2)) < error  # of outputs of the order of 1


def test_a_row_does_not_see_its_neighbours() -> None:
    step = make_step([(33, 1), (90, 1), (5, 1)], decode=True, padding=5)
    together, _ = run(step, Scoring(0.25))
    changed = step.kv_pages.copy()
    changed[np.asarray(step.meta.page_table)[1]] += 100.0
    apart, _ = run(replace(step, kv_pages=changed), Scoring(0.25))
    np.testing.assert_array_equal(together[[0, 2]], apart[[0, 2]])
    assert not np.allclose(together[1], apart[1])


@pytest.mark.parametrize("sequences", [[(33, 1), (90, 1), (5, 1)], [(33, 1), (0, 6), (70, 9)]])
def test_what_lies_behind_the_last_key_is_not_read(sequences: list[tuple[int, int]]) -> None:
    """A sequence whose numbers have gone wrong leaves them in its pages, which others get."""
    step = make_step(sequences, decode=all(new == 1 for _, new in sequences), padding=3)
    poisoned = np.full_like(step.kv_pages, np.nan)
    for row, (old, _) in enumerate(sequences):
        keys = np.arange(old)
        where = np.asarray(step.meta.page_table)[row, keys // 8], keys % 8
        poisoned[where] = step.kv_pages[where]
    out, _ = run(replace(step, kv_pages=poisoned), Scoring(0.25))
    want, _ = run(step, Scoring(0.25))
    np.testing.assert_array_equal(out[: step.num_live], want[: step.num_live])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("decode", [True, False])
def test_lowers_for_accelerators(platform: str, decode: bool) -> None:
    step = make_step([(20, 1), (9, 1)], decode=decode)
    call = partial(attention, scoring=Scoring(0.25), rope=unturned(step), norms=None)
    scratch = start_step(step.meta, 2)
    assert "while" in lower_for(platform, call, packed(step), step.kv_pages, step.meta, scratch).as_text()


def run(step: Step, scoring: Scoring) -> tuple[np.ndarray, np.ndarray]:
    call = jax.jit(partial(attention, scoring=scoring, rope=unturned(step), norms=None))
    out, pages, _ = call(packed(step), step.kv_pages, step.meta, start_step(step.meta, step.k.shape[1]))
    return np.asarray(out), np.asarray(pages)
