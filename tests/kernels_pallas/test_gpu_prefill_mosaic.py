"""The Hopper kernel of long chunks: its tiles by brute force, its arithmetic interpreted, all of it on a GPU."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.engine.host_limits import num_processors
from jaxserve.kernels_pallas import gpu_prefill, gpu_prefill_mosaic, reference
from jaxserve.kernels_pallas.gpu_prefill_mosaic import TILE, MosaicConfig
from jaxserve.kernels_pallas.scoring import Scoring
from tests.kernels_pallas.layouts import Step, cast, make_step, some_of_everything
from tests.kernels_pallas.lowering import lower_for, triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from 0.11 on
_BEFORE_0_11 = "jax._src.pallas.mosaic_gpu.interpret.params"
MIXED = [(40, 1), (0, 64), (7, 1), (300, 200), (0, 63), (129, 65), (5, 3), (1000, 130)]
CASES: dict[str, dict[str, Any]] = {
    "one tile": {"sequences": [(0, 64)]},
    "one prompt": {"sequences": [(0, 700)]},
    "decodes and chunks": {"sequences": MIXED, "padding": 9, "padding_rows": 3},
    "short rows alone": {"sequences": [(40, 1), (64, 1), (0, 63)], "padding": 50},
    "more items than programs": {"sequences": [(17, 600), (0, 500), (300, 333)], "num_heads": 16},
    "page_size 16": {"sequences": MIXED, "page_size": 16},
    "page_size 32": {"sequences": MIXED, "page_size": 32},
    "page_size 128": {"sequences": MIXED, "page_size": 128},
    "page_size 256": {"sequences": MIXED, "page_size": 256},
    "group of 2": {"sequences": MIXED, "num_heads": 4, "num_kv_heads": 2},
    "one kv head": {"sequences": MIXED, "num_heads": 8, "num_kv_heads": 1},
    "head_dim 64": {"sequences": MIXED, "head_dim": 64, "padding": 70},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 11},
    "wide window": {"window": 270},
    "soft cap": {"soft_cap": 2.0},
    "both": {"window": 100, "soft_cap": 5.0},
}


def make(dtype: Any = jnp.bfloat16, **case: Any) -> Step:
    shape: dict[str, Any] = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 128,
        "page_size": 64,
        "tile_size": 32,
    }
    return cast(make_step(**(shape | case)), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("case", "options"), some_of_everything(CASES, OPTIONS))
def test_matches_the_reference(case: dict[str, Any], options: dict[str, Any]) -> None:
    step = make(**case)
    want, want_pages = run_reference(step, **options)
    attend = partial(gpu_prefill_mosaic.attend, scoring=Scoring(step.q.shape[-1] ** -0.5, **options))
    out = jax.jit(attend)(step.q, jnp.asarray(want_pages, step.kv_pages.dtype), step.meta)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.02)  # padding included: zeros


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("config", [MosaicConfig(64, 2), MosaicConfig(64, 4), MosaicConfig(128, 2, 7)])
def test_every_cut_gives_the_same(config: MosaicConfig) -> None:
    step = make(jnp.float16, sequences=MIXED)
    want, want_pages = run_reference(step)
    out = jax.jit(partial(gpu_prefill_mosaic.attend, scoring=Scoring(128**-0.5), config=config))(
        step.q, jnp.asarray(want_pages, jnp.float16), step.meta
    )
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.02)


def _interpreter() -> Any:
    """Public from JAX 0.11 on."""
    name = "InterpretGPUParams"
    return getattr(plgpu if hasattr(plgpu, name) else import_module(_BEFORE_0_11), name)()


@pytest.mark.skipif(num_processors() < 2, reason="JAX's interpreter waits for ever on one thread")
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ({"sequences": [(3, 2), (7, 65)], "page_size": 32}, {}),
        ({"sequences": [(90, 64)]}, {"window": 70, "soft_cap": 5.0}),
    ],
    ids=["two tiles", "window and cap"],
)
def test_long_rows_interpreted(case: dict[str, Any], options: dict[str, Any]) -> None:
    step = make(head_dim=64, num_heads=2, num_kv_heads=1, **case)
    want, want_pages = run_reference(step, **options)
    out = gpu_prefill_mosaic.attend_long_rows(
        jnp.asarray(step.q),
        jnp.asarray(want_pages, step.q.dtype),
        step.meta,
        Scoring(64**-0.5, **options),
        config=MosaicConfig(block_keys=64, num_programs=1),
        interpret=_interpreter(),
    )
    starts = np.asarray(step.meta.query_starts)
    for start, end in pairwise(starts):
        if end - start >= TILE:
            np.testing.assert_allclose(np.asarray(out, np.float32)[start:end], want[start:end], atol=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_tiles_cover_long_rows_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 2, 63, 64, 65, 128, 200, 500], size=rng.integers(1, 9))
    sequences = [(int(rng.integers(0, 300)), int(n)) for n in lengths]
    step = make_step(sequences, padding=int(rng.integers(1, 80)), padding_rows=3, head_dim=1)
    tiles, (num_tiles,) = gpu_prefill_mosaic.plan_tiles(step.meta, step.q.shape[0])
    starts, positions, rows = np.asarray(tiles)[:, :num_tiles]
    covered = np.zeros(step.q.shape[0], np.int32)
    for start, position, row in zip(starts, positions, rows, strict=True):
        tokens = slice(start, start + TILE)
        assert (np.asarray(step.meta.token_rows)[tokens] == row).all()
        assert (np.asarray(step.meta.positions)[tokens] == position + np.arange(TILE)).all()
        covered[tokens] += 1
    is_long = (np.repeat(lengths, lengths) >= TILE).astype(bool)
    assert (covered[: step.num_live][is_long] >= 1).all()
    assert covered.sum() < step.num_live + 64 * len(lengths)
    assert not covered[: step.num_live][~is_long].any()
    assert not covered[step.num_live :].any()
    assert (np.diff(positions) <= 0).all()  # most keys first


def test_short_rows_leave_the_others_alone() -> None:
    step = make(jnp.float32, sequences=[(9, 1), (0, 70), (30, 63)], padding=11, head_dim=16)
    want, want_pages = run_reference(step)
    out = np.full_like(step.q, 7.0)
    out = gpu_prefill.attend(
        jnp.asarray(step.q),
        jnp.asarray(want_pages),
        step.meta,
        Scoring(0.25),
        out=jnp.asarray(out),
        shorter_than=TILE,
        interpret=True,
    )
    assert (np.asarray(out)[1:71] == 7.0).all()
    np.testing.assert_allclose(np.asarray(out)[:1], want[:1], atol=2e-5)
    np.testing.assert_allclose(np.asarray(out)[71:], want[71:], atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"window": 100, "soft_cap": 30.0}], ids=["plain", "window and cap"])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (128, 64), (128, 128)])
def test_lowers_for_cuda(head_dim: int, page_size: int, options: dict[str, Any]) -> None:
    step = make(sequences=[(20, 100), (9, 1)], head_dim=head_dim, page_size=page_size)
    call = partial(gpu_prefill_mosaic.attend, scoring=Scoring(0.25, **options))
    lowered = lower_for("cuda", call, step.q, step.kv_pages, step.meta)
    assert "mosaic_gpu" in lowered.as_text()
    assert [*triton_kernels(lowered)] == ["prefill_attention_short_rows"]


@pytest.mark.parametrize(
    ("case", "dtype", "is_supported"),
    [
        ({}, jnp.bfloat16, True),
        ({"head_dim": 64, "page_size": 16}, jnp.float16, True),
        ({}, jnp.float32, False),
        ({"head_dim": 80}, jnp.bfloat16, False),
        ({"head_dim": 256}, jnp.bfloat16, False),
        ({"num_heads": 6, "num_kv_heads": 2}, jnp.bfloat16, False),
        ({"page_size": 48}, jnp.bfloat16, False),
        ({"sequences": [(0, 63)]}, jnp.bfloat16, False),
    ],
)
def test_says_what_it_supports(case: dict[str, Any], dtype: Any, is_supported: bool) -> None:
    step = make(dtype, **({"sequences": [(0, 64)]} | case))
    assert gpu_prefill_mosaic.supports(jnp.asarray(step.q), jnp.asarray(step.kv_pages)) == is_supported


def run_reference(step: Step, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of the step's rounded values, in float32."""
    q, k, v, kv_pages = (x.astype(np.float32) for x in (step.q, step.k, step.v, step.kv_pages))
    return reference.paged_attention(q, k, v, kv_pages, step.meta, Scoring(q.shape[-1] ** -0.5, **options))
