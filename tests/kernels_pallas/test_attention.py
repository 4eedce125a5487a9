"""Paged attention against the reference, and its lowering for machines that are not here."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.kernels_pallas import reference
from jaxserve.kernels_pallas.attention import paged_attention
from tests.kernels_pallas.layouts import Step, make_step

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
    scale = step.q.shape[-1] ** -0.5
    want, want_pages = reference.paged_attention(
        step.q, step.k, step.v, step.kv_pages, step.meta, scale=scale, **options
    )
    out, pages = run(step, scale=scale, **options)
    np.testing.assert_allclose(out[: step.num_live], want[: step.num_live], atol=2e-5)
    assert np.isfinite(out).all()
    # Page 0 takes what padding tokens write.
    np.testing.assert_array_equal(pages[1:], want_pages[1:])


def test_bfloat16_is_computed_wide_and_rounded_once() -> None:
    step = make_step([(50, 1), (0, 9)])
    q, k, v, kv_pages = (
        np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (step.q, step.k, step.v, step.kv_pages)
    )
    want, _ = reference.paged_attention(q, k, v, kv_pages, step.meta, scale=0.25)
    out, _ = jax.jit(partial(paged_attention, scale=0.25))(q, k, v, kv_pages, step.meta)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32)[: step.num_live], want[: step.num_live].astype(np.float32), atol=0.02
    )


def test_a_row_does_not_see_its_neighbours() -> None:
    step = make_step([(33, 1), (90, 1), (5, 1)], decode=True, padding=5)
    together, _ = run(step, scale=0.25)
    changed = step.kv_pages.copy()
    changed[np.asarray(step.meta.page_table)[1]] += 100.0
    apart, _ = run(Step(step.q, step.k, step.v, changed, step.meta, step.num_live), scale=0.25)
    np.testing.assert_array_equal(together[[0, 2]], apart[[0, 2]])
    assert not np.allclose(together[1], apart[1])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("decode", [True, False])
def test_lowers_for_accelerators(platform: str, decode: bool) -> None:
    step = make_step([(20, 1), (9, 1)], decode=decode)
    device = {
        "cuda": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
        "tpu": AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"),
    }[platform]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(partial(paged_attention, scale=0.25)).trace(
            step.q, step.k, step.v, step.kv_pages, step.meta
        )
        assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


def run(step: Step, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, pages = jax.jit(partial(paged_attention, **options))(
        step.q, step.k, step.v, step.kv_pages, step.meta
    )
    return np.asarray(out), np.asarray(pages)
