"""GPU decode attention against the reference: interpreted on any machine, compiled under the marker `gpu`."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import reference
from jaxserve.kernels_pallas.gpu_decode import decode_attention
from jaxserve.kernels_pallas.heads import HeadNorms, RopeTable, rms_norm, rotate
from jaxserve.kernels_pallas.scoring import Scoring
from jaxserve.kernels_pallas.tuning import DecodeTuning, decode_rule, decode_tuning, measured_rows
from tests.kernels_pallas.layouts import Step, make_step, packed, unturned
from tests.kernels_pallas.lowering import lower_for
from tests.quick_compile import QUICK

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

WHOLE = DecodeTuning(block_kv=16, num_splits=1, split_tokens=16, num_warps=4, num_stages=2)
SPLIT = replace(WHOLE, num_splits=4)  # a row of 16 cached tokens has one split, one of 49 has all four
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
COMPILED = pytest.param(False, marks=NEEDS_GPU, id="compiled")
INTERPRET = pytest.mark.parametrize("interpret", [pytest.param(True, id="interpreted"), COMPILED])
MEASURED = sorted({(key[1], astuple(row)) for key, row in measured_rows().items()})

RAGGED = [(5, 1), (130, 1), (0, 1), (63, 1), (64, 1), (16, 1)]
CASES: dict[str, dict[str, Any]] = {
    "ragged rows, padding": {"sequences": RAGGED, "padding": 2, "head_dim": 64},
    "first token of all": {"sequences": [(0, 1)], "head_dim": 64},
    "group 1": {"sequences": [(40, 1), (7, 1)], "num_heads": 2, "head_dim": 128},
    "group 4, wide": {"sequences": [(90, 1)], "num_heads": 8, "head_dim": 256},
    "group 8": {"sequences": [(40, 1), (70, 1)], "num_heads": 16, "head_dim": 64},
    "group 24, above a tile": {"sequences": [(33, 1)], "num_heads": 24, "num_kv_heads": 1, "head_dim": 64},
    "head_dim 80": {"sequences": [(17, 1), (66, 1)], "head_dim": 80},
    "head_dim 96": {"sequences": [(31, 1), (80, 1)], "head_dim": 96},
    "small pages in large blocks": {"sequences": [(77, 1)], "head_dim": 64, "page_size": 8},
    "large pages": {"sequences": [(200, 1), (127, 1)], "head_dim": 64, "page_size": 128},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 19},
    "window of one": {"window": 1},
    "soft cap": {"soft_cap": 2.0},
    "both": {"window": 50, "soft_cap": 5.0},
}


@INTERPRET
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference_and_writes_its_slots_alone(case: dict[str, Any], interpret: bool) -> None:
    check(decode_step(**case), tuning=SPLIT, interpret=interpret)


@INTERPRET
@pytest.mark.parametrize("tuning", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict[str, Any], tuning: DecodeTuning, interpret: bool) -> None:
    step = decode_step(sequences=RAGGED, padding=2, head_dim=64)
    check(step, tuning=tuning, interpret=interpret, **options)


@INTERPRET
@pytest.mark.parametrize("block_kv", [32, 64])
def test_blocks_of_several_pages(block_kv: int, interpret: bool) -> None:
    step = decode_step(sequences=RAGGED, head_dim=64)
    check(step, tuning=replace(SPLIT, block_kv=block_kv, split_tokens=block_kv), interpret=interpret)


@INTERPRET
@pytest.mark.parametrize(("head_dim", "row"), MEASURED)
def test_every_measured_tuning(head_dim: int, row: tuple[int, ...], interpret: bool) -> None:
    sequences = [(2200, 1), (599, 1), (64, 1), (0, 1)]  # from one split to several, whichever row
    step = decode_step(dtype=jnp.bfloat16, page_size=64, sequences=sequences, head_dim=head_dim)
    check(step, tuning=DecodeTuning(*row), interpret=interpret, tolerance=0.02)


@INTERPRET
@pytest.mark.parametrize("num_rows", [1, 24])
def test_the_tuning_that_is_chosen_by_itself(num_rows: int, interpret: bool) -> None:
    rng = np.random.default_rng(1)
    sequences = [(int(old), 1) for old in rng.integers(0, 300, num_rows)]
    check(decode_step(sequences=sequences, head_dim=64), tuning=None, interpret=interpret)


@INTERPRET
@pytest.mark.parametrize(
    ("dtype", "page_dtype", "tolerance"),
    [
        (jnp.bfloat16, jnp.bfloat16, 0.01),
        (jnp.float16, jnp.float16, 2e-3),
        (jnp.float32, jnp.bfloat16, 1e-5),
        (jnp.bfloat16, jnp.float8_e4m3fn, 0.01),
        (jnp.float16, jnp.float8_e5m2, 2e-3),
        (jnp.float32, jnp.float8_e4m3fn, 1e-5),
    ],
)
def test_dtypes(dtype: Any, page_dtype: Any, tolerance: float, interpret: bool) -> None:
    step = decode_step(sequences=RAGGED, padding=2, head_dim=64, dtype=dtype, page_dtype=page_dtype)
    check(step, tuning=replace(SPLIT, block_kv=32), interpret=interpret, tolerance=tolerance)


@INTERPRET
@pytest.mark.parametrize("page_dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float16])
def test_what_a_page_cannot_hold_is_cut_off(page_dtype: Any, interpret: bool) -> None:
    step = decode_step(sequences=RAGGED, padding=2, head_dim=64, dtype=jnp.bfloat16, page_dtype=page_dtype)
    step.k[1, 0, 3], step.v[2, 1, 5] = 3e5, -3e5
    check(step, tuning=SPLIT, interpret=interpret, tolerance=0.02)


@INTERPRET
@pytest.mark.parametrize(
    ("head_dim", "dtype", "with_norms", "tuning"),
    [
        (64, jnp.float32, False, WHOLE),
        (80, jnp.float32, False, SPLIT),
        (96, jnp.float32, True, SPLIT),
        (128, jnp.bfloat16, True, SPLIT),
    ],
)
def test_rope_and_norms_fused(
    head_dim: int, dtype: Any, with_norms: bool, tuning: DecodeTuning, interpret: bool
) -> None:
    step = decode_step(sequences=RAGGED, padding=2, head_dim=head_dim, dtype=dtype, page_dtype=dtype)
    rng = np.random.default_rng(3)
    num_rows, num_kv_heads, _ = step.k.shape
    angles = np.asarray(step.meta.positions)[:, None] * rng.uniform(0.01, 1.0, head_dim // 2)
    table = RopeTable(jnp.cos(jnp.float32(angles)), jnp.sin(jnp.float32(angles)))
    q_scale, k_scale = (jnp.asarray(rng.uniform(0.5, 2.0, head_dim), dtype) for _ in range(2))
    norms = HeadNorms(q_scale, k_scale, 1e-5) if with_norms else None

    def prepared(x: np.ndarray, norm: jax.Array) -> np.ndarray:
        given = jnp.asarray(x)
        return np.asarray(rotate(rms_norm(given, norm, 1e-5) if with_norms else given, table))

    wide = replace(step, q=prepared(step.q, q_scale), k=prepared(step.k, k_scale))
    want, want_pages = reference.paged_attention(
        wide.q, wide.k, wide.v, wide.kv_pages, wide.meta, Scoring(0.125)
    )
    call = partial(
        decode_attention,
        scoring=Scoring(0.125),
        rope=table,
        norms=norms,
        tuning=tuning,
        interpret=interpret,
    )

    @partial(jax.jit, donate_argnums=(1, 3), compiler_options=QUICK if interpret else None)
    def twice(qkv, kv_pages, meta, counters):
        """As two layers would: the second must find the counters cleared, and what the first has written."""
        _, kv_pages, counters = call(qkv, kv_pages, meta, counters=counters)
        return call(qkv, kv_pages, meta, counters=counters)

    counters = jnp.zeros((num_rows, num_kv_heads), jnp.int32)
    out, pages, counters = twice(jnp.asarray(packed(step)), jnp.asarray(step.kv_pages), step.meta, counters)
    # A sum's order may move one of the rotated values to the neighbouring bfloat16.
    tolerance = 2e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(wide_array(out), wide_array(want), atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(wide_array(pages), wide_array(want_pages), atol=1e-5, rtol=tolerance / 2)
    untouched = np.ones(want_pages.shape[:2], bool)
    untouched[written_slots(step)] = False
    np.testing.assert_array_equal(wide_array(pages)[untouched], wide_array(step.kv_pages)[untouched])
    assert not np.asarray(counters).any()


@INTERPRET
def test_a_row_reads_neither_its_slot_nor_what_lies_behind(interpret: bool) -> None:
    step = decode_step(sequences=RAGGED, padding=1, head_dim=64)
    visible = np.zeros(step.kv_pages.shape[:2], bool)
    for row, (old, _) in enumerate(RAGGED):
        where = np.arange(old)
        visible[np.asarray(step.meta.page_table)[row, where // 16], where % 16] = True
    poisoned = step.kv_pages.copy()
    poisoned[~visible] = np.nan
    want, _ = run(step, tuning=SPLIT, interpret=interpret)
    out, _ = run(replace(step, kv_pages=poisoned), tuning=SPLIT, interpret=interpret)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("page_dtype", [None, jnp.float8_e4m3fn])
@pytest.mark.parametrize("tuning", [WHOLE, SPLIT], ids=["whole", "split"])
def test_lowers_for_cuda_as_one_kernel(
    head_dim: int, dtype: Any, page_dtype: Any, tuning: DecodeTuning
) -> None:
    step = decode_step(sequences=[(20, 1), (9, 1)], head_dim=head_dim, dtype=dtype, page_dtype=page_dtype)
    call = partial(
        decode_attention,
        scoring=Scoring(0.25, window=9, soft_cap=3.0),
        rope=unturned(step),
        counters=jnp.zeros((2, 2), jnp.int32),
        tuning=tuning,
    )
    text = lower_for("cuda", call, packed(step), step.kv_pages, step.meta).as_text()
    assert text.count("custom_call") == 1
    assert text.count("#stablehlo.output_operand_alias<") == 2  # pages and counters


def test_what_the_kernel_cannot_do_is_refused() -> None:
    step = decode_step(sequences=[(20, 1)], head_dim=24)
    with pytest.raises(ValueError, match="multiples of 16"):
        run(step, tuning=WHOLE, interpret=True)


def test_the_rule_fills_the_device_and_fits_shared_memory() -> None:
    for head_dim in (64, 80, 128, 256):
        for itemsize in (1, 2, 4):
            for num_programs in (1, 8, 64, 100, 2048):
                rule = decode_rule(head_dim=head_dim, itemsize=itemsize, num_programs=num_programs)
                assert rule.block_kv in (16, 32, 64, 128)
                assert rule.split_tokens % rule.block_kv == 0
                assert rule.num_stages * rule.block_kv * 2 * head_dim * itemsize <= 200 * 1024
                assert rule.num_splits == 1 or rule.num_splits * num_programs <= 512
    few = decode_tuning("unheard-of", head_dim=16, group=1, dtype="float32", itemsize=4, num_programs=8)
    assert few == decode_rule(head_dim=16, itemsize=4, num_programs=8)


def decode_step(
    *, dtype: Any = jnp.float32, page_dtype: Any = None, page_size: int = 16, **layout: Any
) -> Step:
    """A decode step with q, k and v in `dtype`, over pages in `page_dtype` (the same unless given)."""
    step = make_step(decode=True, page_size=page_size, **layout)
    q, k, v = (np.array(jnp.asarray(x, dtype)) for x in (step.q, step.k, step.v))
    pages = np.asarray(jnp.asarray(step.kv_pages, page_dtype or dtype))
    return replace(step, q=q, k=k, v=v, kv_pages=pages)


def check(
    step: Step, *, tuning: DecodeTuning | None, interpret: bool, tolerance: float = 2e-5, **options: Any
) -> None:
    scoring = Scoring(step.q.shape[-1] ** -0.5, **options)
    want, want_pages = reference.paged_attention(step.q, step.k, step.v, step.kv_pages, step.meta, scoring)
    out, pages = run(step, tuning=tuning, interpret=interpret, **options)
    assert out.dtype == step.q.dtype
    np.testing.assert_allclose(wide_array(out), wide_array(want), atol=tolerance, rtol=tolerance)
    assert not wide_array(out)[step.num_live :].any()
    # Page 0 too: padding rows write nothing.
    np.testing.assert_array_equal(wide_array(pages), wide_array(want_pages))


def run(
    step: Step, *, tuning: DecodeTuning | None, interpret: bool, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    call = partial(
        decode_attention,
        scoring=Scoring(step.q.shape[-1] ** -0.5, **options),
        rope=unturned(step),
        counters=jnp.zeros(step.k.shape[:2], jnp.int32),
        tuning=tuning,
        interpret=interpret,
    )
    jitted = jax.jit(call, donate_argnums=1, compiler_options=QUICK if interpret else None)
    out, pages, counters = jitted(jnp.asarray(packed(step)), jnp.asarray(step.kv_pages), step.meta)
    assert not np.asarray(counters).any()
    return np.asarray(out), np.asarray(pages)


def wide_array(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def written_slots(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Page and offset of each live row's new token."""
    rows = np.arange(step.num_live)
    positions = np.asarray(step.meta.positions)[rows]
    page_size = step.kv_pages.shape[1]
    return np.asarray(step.meta.page_table)[rows, positions // page_size], positions % page_size
