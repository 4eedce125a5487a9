"""The CPU kernel against the reference, alone and through the door for models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import cpu_attention, reference
from jaxserve.kernels_pallas.attention import attention, backend_of, start_step
from jaxserve.kernels_pallas.heads import HeadNorms, RopeTable, split_heads
from jaxserve.kernels_pallas.scoring import Scoring
from tests.kernels_pallas.layouts import Step, make_step, packed, unturned

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA calls this kernel on CPUs only")

CASES: dict[str, dict[str, Any]] = {
    "one row": {"sequences": [(20, 1)]},
    "one prompt": {"sequences": [(0, 13)], "decode": False},
    "chunks and decodes, padding": {
        "sequences": [(40, 1), (7, 1), (0, 30), (300, 26), (16, 3)],
        "decode": False,
        "padding": 5,
        "padding_rows": 2,
        "head_dim": 64,
    },
    "one long chunk": {"sequences": [(100, 300)], "decode": False, "page_size": 16, "head_dim": 32},
    "first token of all": {"sequences": [(0, 1)]},
    "ragged, padding": {"sequences": [(5, 1), (130, 1), (63, 1), (64, 1)], "padding": 4},
    "enough for many threads": {"sequences": [(n * 40, 1) for n in range(16)], "padding": 16},
    "full last page": {"sequences": [(15, 1), (16, 1), (17, 1)], "page_size": 16},
    "no groups": {"sequences": [(9, 1)], "num_heads": 4, "num_kv_heads": 4},
    "one kv head": {"sequences": [(90, 1), (3, 1)], "num_heads": 8, "num_kv_heads": 1},
    "head_dim 64": {"sequences": [(300, 1)], "head_dim": 64, "num_heads": 9, "num_kv_heads": 3},
    "head_dim 80": {"sequences": [(17, 1)], "head_dim": 80, "page_size": 16},
    "head_dim 128, large pages": {"sequences": [(70, 1), (30, 1)], "head_dim": 128, "page_size": 64},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 11},
    "soft cap": {"soft_cap": 2.0},
    "both": {"window": 3, "soft_cap": 5.0},
}


def cpu_step(**case: Any) -> Step:
    step = make_step(**{"decode": True, **case})
    return replace(step, meta=replace(step.meta, backend="cpu"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(case: dict[str, Any], options: dict[str, Any]) -> None:
    step = cpu_step(**case)
    scoring = Scoring(step.q.shape[-1] ** -0.5, **options)
    want, want_pages = reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, scoring)
    call = jax.jit(partial(attention, scoring=scoring, rope=unturned(step), norms=None))
    out, pages, _ = call(packed(step), step.kv_pages, step.meta, start_step(step.meta, step.k.shape[1]))
    np.testing.assert_allclose(out[: step.num_live], want[: step.num_live], atol=2e-5)
    np.testing.assert_array_equal(out[step.num_live :], 0)
    np.testing.assert_array_equal(np.asarray(pages)[1:], want_pages[1:])


def test_a_row_is_the_same_to_the_bit_in_any_company() -> None:
    lengths = [700, 3, 64, 129, 31, 250]
    together = cpu_step(sequences=[(n, 1) for n in lengths])
    attend = partial(cpu_attention.attend, scoring=Scoring(0.25))
    rows = jax.jit(attend)(together.q, together.kv_pages, together.meta)
    for row in range(len(lengths)):
        part = slice(row, row + 1)
        meta = replace(
            together.meta,
            page_table=together.meta.page_table[part],
            kv_lens=together.meta.kv_lens[part],
            positions=together.meta.positions[part],
            token_rows=jnp.zeros(1, jnp.int32),
        )
        alone = jax.jit(attend)(together.q[part], together.kv_pages, meta)
        np.testing.assert_array_equal(alone[0], rows[row])


def test_a_nan_in_the_cache_is_not_hidden_and_stays_in_its_row() -> None:
    step = cpu_step(sequences=[(40, 1), (40, 1)])
    pages = step.kv_pages.copy()
    pages[np.asarray(step.meta.page_table)[0, 1]] = np.nan
    out = np.asarray(cpu_attention.attend(jnp.asarray(step.q), jnp.asarray(pages), step.meta, Scoring(0.25)))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_calls_in_a_row_do_not_mix() -> None:
    """Layers follow each other without a wait of the host's; threads of one call may end late."""
    step = cpu_step(sequences=[(n * 37, 1) for n in range(1, 9)], head_dim=64)

    @jax.jit
    def chain(q: jax.Array) -> jax.Array:
        for _ in range(20):
            q = q + cpu_attention.attend(q, jnp.asarray(step.kv_pages), step.meta, Scoring(0.1))
        return q

    first = chain(jnp.asarray(step.q))
    for _ in range(20):
        np.testing.assert_array_equal(chain(jnp.asarray(step.q)), first)


@pytest.mark.parametrize("has_norms", [False, True])
def test_the_door_rotates_and_normalises(has_norms: bool) -> None:
    step = cpu_step(sequences=[(21, 1), (4, 1)], head_dim=16)
    rng = np.random.default_rng(1)
    rows, num_kv_heads, head_dim = 2, 2, 16
    qkv = rng.standard_normal((rows, num_kv_heads, 3 + 2, head_dim), np.float32)
    angles = rng.standard_normal((rows, head_dim // 2), np.float32)
    rope = RopeTable(jnp.cos(angles), jnp.sin(angles))
    scales = rng.standard_normal((2, head_dim), np.float32)
    norms = HeadNorms(scales[0], scales[1], 1e-5) if has_norms else None
    out, pages, _ = attention(
        jnp.asarray(qkv),
        jnp.asarray(step.kv_pages),
        step.meta,
        start_step(step.meta, num_kv_heads),
        Scoring(0.25),
        rope=rope,
        norms=norms,
    )
    # By hand, in float64: heads are complex numbers that turn, and the pages hold turned keys.
    q, k, v = (np.asarray(x, np.float64) for x in (qkv[:, :, :3], qkv[:, :, 3:4], qkv[:, :, 4]))
    if has_norms:
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-5) * scales[0]
        k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-5) * scales[1]

    def turn(x: np.ndarray) -> np.ndarray:
        turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angles)[:, None, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k = turn(q).reshape(rows, 6, head_dim), turn(k)[:, :, 0]
    narrow = [x.astype(np.float32) for x in (q, k, v)]
    want, want_pages = reference.paged_attention(
        narrow[0], narrow[1], narrow[2], step.kv_pages, step.meta, Scoring(0.25)
    )
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(np.asarray(pages)[1:], want_pages[1:], atol=2e-5)
    np.testing.assert_allclose(split_heads(jnp.asarray(qkv), rope, norms)[0], q, atol=2e-5)


def test_the_backend_fits_platform_and_pages() -> None:
    assert backend_of("cpu", 64) == backend_of("cpu", 12) == "cpu"
    assert backend_of("gpu", 128) == backend_of("cuda", 128) == "gpu"
    assert backend_of("gpu", 12) == "xla"
    assert backend_of("tpu", 128) == "tpu"
    assert backend_of("METAL", 128) == "xla"
