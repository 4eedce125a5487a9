"""The TPU kernel against the reference, interpreted, and lowered for TPUs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import reference, tpu_attention
from jaxserve.kernels_pallas.attention import attention, backend_of, start_step
from jaxserve.kernels_pallas.scoring import Scoring
from tests.kernels_pallas.layouts import Step, make_step, packed, unturned
from tests.kernels_pallas.lowering import lower_for
from tests.quick_compile import interpretable

MIXED = [(40, 1), (7, 1), (0, 10), (300, 6), (0, 1), (129, 45)]
RAGGED = [(5, 1), (130, 1), (0, 1), (63, 1), (64, 1), (16, 1)]
CASES: dict[str, dict[str, Any]] = {
    "ragged decodes, padding": {"sequences": RAGGED, "decode": True, "padding": 2},
    "one kv head, pages of 128": {
        "sequences": RAGGED, "decode": True, "page_size": 128, "num_heads": 8, "num_kv_heads": 1
    },
    "no group": {"sequences": [(90, 1)], "decode": True, "num_heads": 4, "num_kv_heads": 4, "page_size": 32},
    "decodes and chunks": {"sequences": MIXED, "padding": 9, "padding_rows": 3, "tile_size": 16},
    "a chunk behind a cached prefix": {"sequences": [(200, 33)], "padding": 7, "tile_size": 8},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 19},
    "soft cap": {"soft_cap": 2.0},
    "both": {"window": 70, "soft_cap": 5.0},
}


def make(**case: Any) -> Step:
    step = make_step(**{"head_dim": 128, "page_size": 16, **case})
    narrow = {
        name: np.array(jnp.asarray(getattr(step, name), jnp.bfloat16)) for name in ("q", "k", "v", "kv_pages")
    }
    return replace(step, **narrow, meta=replace(step.meta, backend="tpu"))


@pytest.mark.parametrize(("case", "options"), [(case, [*OPTIONS][i % 4]) for i, case in enumerate(CASES)])
def test_matches_the_reference(case: str, options: str) -> None:
    step = make(**CASES[case])
    scoring = Scoring(128**-0.5, **OPTIONS[options])
    want, pages = reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, scoring)
    attend = interpretable(tpu_attention.attend, interpret=True, scoring=scoring, block_tokens=128)
    out = attend(jnp.asarray(step.q), jnp.asarray(pages), step.meta)
    np.testing.assert_allclose(np.float32(out), np.float32(want), atol=0.02, rtol=0.02)  # padding: zeros


@pytest.mark.parametrize("case", ["ragged decodes, padding", "a chunk behind a cached prefix", "100 tokens"])
def test_writes_the_step_and_nothing_else(case: str) -> None:
    step = make(**CASES.get(case, {"sequences": [(3, 100)]}))
    _, want = reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, Scoring(0.1))
    arrays = (jnp.asarray(x) for x in (step.kv_pages, step.k, step.v))
    pages = interpretable(tpu_attention.write_kv, interpret=True)(*arrays, step.meta)
    np.testing.assert_array_equal(
        np.asarray(pages, np.float32)[1:], want[1:].astype(np.float32)
    )  # padding writes to page 0


def test_what_lies_behind_the_last_key_is_not_read() -> None:
    step = make(sequences=RAGGED, decode=True)
    _, pages = reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, Scoring(0.1))
    poisoned = np.full_like(pages, np.nan)
    for row, (old, _) in enumerate(RAGGED):
        keys = np.arange(old + 1)
        where = np.asarray(step.meta.page_table)[row, keys // 16], keys % 16
        poisoned[where] = pages[where]
    attend = interpretable(tpu_attention.attend, interpret=True, scoring=Scoring(0.1), block_tokens=64)
    out = attend(jnp.asarray(step.q), jnp.asarray(poisoned), step.meta)
    np.testing.assert_array_equal(out, attend(jnp.asarray(step.q), jnp.asarray(pages), step.meta))


def test_a_padding_row_between_others_breaks_no_chain_of_fetches() -> None:
    step = make(sequences=[(200, 1), (70, 1), (150, 1)], decode=True)
    attend = interpretable(tpu_attention.attend, interpret=True, scoring=Scoring(0.1), block_tokens=64)
    whole = np.asarray(attend(jnp.asarray(step.q), jnp.asarray(step.kv_pages), step.meta), np.float32)
    meta = replace(step.meta, kv_lens=step.meta.kv_lens.at[1].set(0))
    out = np.asarray(attend(jnp.asarray(step.q), jnp.asarray(step.kv_pages), meta), np.float32)
    np.testing.assert_array_equal(out[[0, 2]], whole[[0, 2]])
    assert not out[1].any()


@pytest.mark.parametrize("decode", [True, False])
def test_the_door_lowers_it_for_tpus(decode: bool) -> None:
    assert backend_of("tpu", 128) == "tpu"
    step = make(sequences=[(20, 1), (9, 1 if decode else 30)], decode=decode)
    call = partial(attention, scoring=Scoring(0.1, window=9, soft_cap=3.0), rope=unturned(step), norms=None)
    scratch = start_step(step.meta, 2)
    args = packed(step), step.kv_pages, step.meta, scratch
    text = lower_for("tpu", call, *args).as_text()
    assert "paged_attention_tpu" in text
    assert "write_kv_tpu" in text
    wide = jax.ShapeDtypeStruct(step.kv_pages.shape, jnp.float32)
    assert "paged_attention_tpu" not in lower_for("tpu", call, args[0], wide, *args[2:]).as_text()
