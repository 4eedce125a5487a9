"""The GPU kernel of mixed steps against the reference: interpreted anywhere, compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import gpu_prefill, reference, xla
from jaxserve.kernels_pallas.gpu_prefill import PrefillConfig
from jaxserve.kernels_pallas.scoring import Scoring
from tests.kernels_pallas.layouts import Step, cast, make_step, some_of_everything
from tests.kernels_pallas.lowering import lower_for, triton_kernels
from tests.quick_compile import interpretable

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from 0.11 on
COMPILED = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
MODES = [pytest.param(True, id="interpreted"), pytest.param(False, id="compiled", marks=COMPILED)]
RAGGED = [(40, 1), (7, 1), (0, 10), (300, 6), (0, 1), (129, 45)]
MIXED = [(129, 1), (40, 20)]
CASES: dict[str, dict[str, Any]] = {
    "one prompt": {"sequences": [(0, 70)], "tile_size": 32},
    "decodes and chunks": {"sequences": RAGGED, "padding": 9, "padding_rows": 3, "tile_size": 32},
    "decodes alone": {"sequences": [(40, 1), (64, 1), (63, 1)], "padding": 5, "tile_size": 32},
    "a chunk behind a cached prefix": {"sequences": [(200, 33)], "padding": 31, "tile_size": 16},
    "more padding than tiles hold": {"sequences": [(5, 3)], "padding": 90, "tile_size": 4},
    "no group": {"sequences": RAGGED, "num_heads": 2, "num_kv_heads": 2, "tile_size": 32},
    "group of 4": {"sequences": RAGGED, "num_heads": 8, "num_kv_heads": 2, "tile_size": 32, "page_size": 16},
    "group of 8": {"sequences": RAGGED, "num_heads": 8, "num_kv_heads": 1, "tile_size": 64, "page_size": 32},
    "head_dim 64": {"sequences": RAGGED, "head_dim": 64, "page_size": 16, "tile_size": 20, "padding": 2},
    "head_dim 80": {"sequences": RAGGED, "head_dim": 80, "page_size": 64, "tile_size": 20, "padding": 2},
    "head_dim 96": {"sequences": RAGGED, "head_dim": 96, "page_size": 128, "tile_size": 32},
    "head_dim 128": {"sequences": RAGGED, "head_dim": 128, "page_size": 64, "tile_size": 8, "padding": 2},
    "head_dim 256": {"sequences": RAGGED, "head_dim": 256, "page_size": 128, "tile_size": 8},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 11},
    "wide window": {"window": 70},
    "soft cap": {"soft_cap": 2.0},
    "both": {"window": 3, "soft_cap": 5.0},
}


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("case", "options"), some_of_everything(CASES, OPTIONS))
def test_matches_the_reference(case: dict[str, Any], options: dict[str, Any], interpret: bool) -> None:
    step = make_step(**case)
    want, want_pages = run_reference(step, **options)
    out, pages = run(step, interpret=interpret, **options)
    np.testing.assert_allclose(out, want, atol=2e-5)  # padding included: zeros
    np.testing.assert_array_equal(pages[1:], want_pages[1:])  # page 0 takes what padding tokens write


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("block_rows", "block_keys"), [(16, 128), (64, 16), (64, 64), (32, 128)])
def test_every_cut_gives_the_same(block_rows: int, block_keys: int, interpret: bool) -> None:
    step = make_step(RAGGED, num_heads=8, head_dim=16, page_size=64, tile_size=48, padding=7)
    want, _ = run_reference(step, window=70)
    config = PrefillConfig(block_rows=block_rows, block_keys=block_keys, num_warps=4, num_stages=2)
    out, _ = run(step, interpret=interpret, config=config, window=70)
    np.testing.assert_allclose(out, want, atol=2e-5)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(jnp.bfloat16, 64), (jnp.float16, 80), (jnp.bfloat16, 96), (jnp.bfloat16, 128), (jnp.float16, 256)],
)
def test_half_precision(dtype: Any, head_dim: int, interpret: bool) -> None:
    step = make_step(RAGGED, num_heads=8, head_dim=head_dim, page_size=64, tile_size=32, padding=7)
    step = cast(step, dtype)
    want, want_pages = run_reference(step)
    out, pages = run(step, interpret=interpret)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), atol=0.02)
    np.testing.assert_array_equal(pages[1:].astype(np.float32), want_pages[1:].astype(np.float32))


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(
    ("dtype", "page_dtype", "head_dim", "page_size"),
    [(jnp.bfloat16, jnp.float8_e4m3fn, 128, 16), (jnp.float16, jnp.float8_e5m2, 80, 128)],
)
def test_pages_may_be_narrower_than_queries(
    dtype: Any, page_dtype: Any, head_dim: int, page_size: int, interpret: bool
) -> None:
    step = make_step(MIXED, num_heads=8, head_dim=head_dim, page_size=page_size, tile_size=32)
    step = replace(cast(step, dtype), kv_pages=step.kv_pages.astype(page_dtype))
    want, _ = run_reference(step, window=70, soft_cap=5.0)
    out, pages = run(step, interpret=interpret, window=70, soft_cap=5.0)
    assert pages.dtype == page_dtype
    np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), atol=0.02)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("page_size", [16, 128])
def test_what_lies_behind_the_last_key_is_not_read(page_size: int, interpret: bool) -> None:
    step = make_step(RAGGED, page_size=page_size, tile_size=32)
    want, want_pages = run_reference(step)
    poisoned = np.full_like(step.kv_pages, np.nan)
    table, kv_lens = np.asarray(step.meta.page_table), np.asarray(step.meta.kv_lens)
    for row, kv_len in enumerate(kv_lens):
        keys = np.arange(kv_len)
        where = table[row, keys // page_size], keys % page_size
        poisoned[where] = want_pages[where]
    out, _ = run(replace(step, kv_pages=poisoned), interpret=interpret)
    np.testing.assert_allclose(out, want, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"window": 100, "soft_cap": 30.0}], ids=["plain", "window and cap"])
@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.bfloat16, 80), (jnp.float32, 64), (jnp.float16, 256)])
def test_lowers_for_cuda(dtype: Any, head_dim: int, options: dict[str, Any]) -> None:
    step = cast(make_step(RAGGED, head_dim=head_dim, page_size=64, tile_size=32), dtype)
    call = partial(gpu_prefill.attend, scoring=Scoring(scale=0.25, **options))
    assert [*triton_kernels(lower_for("cuda", call, step.q, step.kv_pages, step.meta))] == [
        "prefill_attention"
    ]


def test_tiles_fill_a_program() -> None:
    assert gpu_prefill.tile_size(32, 8, 128, jnp.bfloat16) == 32
    assert gpu_prefill.tile_size(24, 8, 128, jnp.bfloat16) == 42
    assert gpu_prefill.tile_size(8, 8, 64, jnp.bfloat16) == 128


def run_reference(step: Step, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    scoring = Scoring(step.q.shape[-1] ** -0.5, **options)
    return reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, scoring)


def run(
    step: Step, *, interpret: bool, config: PrefillConfig | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    scoring = Scoring(step.q.shape[-1] ** -0.5, **options)
    pages = xla.write_kv(jnp.asarray(step.kv_pages), jnp.asarray(step.k), jnp.asarray(step.v), step.meta)
    attend = interpretable(gpu_prefill.attend, interpret=interpret, scoring=scoring, config=config)
    out = attend(jnp.asarray(step.q), pages, step.meta)
    return np.asarray(out), np.asarray(pages)
