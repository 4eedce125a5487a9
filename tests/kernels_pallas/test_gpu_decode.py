"""GPU decode attention against the reference: interpreted on any machine, compiled under the marker `gpu`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.kernels_pallas import reference
from jaxserve.kernels_pallas.gpu_decode import decode_attention, fused_decode_attention
from jaxserve.kernels_pallas.heads import HeadNorms, RopeTable, rms_norm, rotate
from jaxserve.kernels_pallas.tuning import DecodeTuning, decode_rule, decode_tuning
from tests.kernels_pallas.layouts import Step, make_step

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

WHOLE = DecodeTuning(block_kv=16, num_splits=1, split_tokens=16, num_warps=4, num_stages=2)
SPLIT = replace(WHOLE, num_splits=4)  # a row of 16 cached tokens has one split, one of 49 has all four
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
COMPILED = pytest.param(False, marks=NEEDS_GPU, id="compiled")
INTERPRET = pytest.mark.parametrize("interpret", [pytest.param(True, id="interpreted"), COMPILED])

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
        (jnp.float32, jnp.float8_e4m3fn, 1e-5),
    ],
)
def test_dtypes(dtype: Any, page_dtype: Any, tolerance: float, interpret: bool) -> None:
    step = decode_step(sequences=RAGGED, padding=2, head_dim=64, dtype=dtype, page_dtype=page_dtype)
    check(step, tuning=replace(SPLIT, block_kv=32), interpret=interpret, tolerance=tolerance)


@INTERPRET
def test_eight_bit_pages_with_scales(interpret: bool) -> None:
    step = decode_step(sequences=RAGGED, padding=2, head_dim=64, page_dtype=jnp.float8_e4m3fn)
    scales = np.array([[0.125, 2.0], [0.5, 0.25]], np.float32)  # [K, 2]
    # Saturation: 300 / 0.125 is more than e4m3 can hold.
    k = step.k.copy()
    k[1, 0, 3] = 300.0
    step = replace(step, k=k)
    stored = np.stack([step.k, step.v], axis=2) / scales[:, :, None]  # [T, K, 2, H]
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    stored = np.clip(stored, -largest, largest).astype(step.kv_pages.dtype)
    kept = stored.astype(np.float32) * scales[:, :, None]
    wide = replace(
        step,
        k=kept[:, :, 0],
        v=kept[:, :, 1],
        kv_pages=step.kv_pages.astype(np.float32) * scales[:, :, None],
    )
    want, want_pages = reference.paged_attention(
        wide.q, wide.k, wide.v, wide.kv_pages, wide.meta, scale=0.125
    )
    out, pages = run(step, scale=0.125, kv_scales=jnp.asarray(scales), tuning=SPLIT, interpret=interpret)
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(pages.astype(np.float32) * scales[:, :, None], want_pages)


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
    qkv = np.concatenate(
        [step.q.reshape(num_rows, num_kv_heads, -1, head_dim), step.k[:, :, None], step.v[:, :, None]], axis=2
    )

    def prepared(x: np.ndarray, norm: jax.Array) -> np.ndarray:
        given = jnp.asarray(x)
        return np.asarray(rotate(rms_norm(given, norm, 1e-5) if with_norms else given, table))

    wide = replace(step, q=prepared(step.q, q_scale), k=prepared(step.k, k_scale))
    want, want_pages = reference.paged_attention(
        wide.q, wide.k, wide.v, wide.kv_pages, wide.meta, scale=0.125
    )
    call = partial(
        fused_decode_attention,
        rope=(table.cos, table.sin),
        scale=0.125,
        norms=norms,
        tuning=tuning,
        interpret=interpret,
    )

    @partial(jax.jit, donate_argnums=(1, 3), compiler_options=quickly(interpret))
    def twice(qkv, kv_pages, meta, counters):
        """As two layers would: the second must find the counters cleared, and what the first has written."""
        _, kv_pages, counters = call(qkv, kv_pages, meta, counters=counters)
        return call(qkv, kv_pages, meta, counters=counters)

    counters = jnp.zeros((num_rows, num_kv_heads), jnp.int32)
    out, pages, counters = twice(jnp.asarray(qkv), jnp.asarray(step.kv_pages), step.meta, counters)
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
    call = jax.jit(
        partial(decode_attention, scale=0.125, tuning=SPLIT, interpret=interpret),
        compiler_options=quickly(interpret),
    )
    want, _ = call(step.q, step.k, step.v, step.kv_pages, step.meta)
    out, _ = call(step.q, step.k, step.v, poisoned, step.meta)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("page_dtype", [None, jnp.float8_e4m3fn])
@pytest.mark.parametrize("tuning", [WHOLE, SPLIT], ids=["whole", "split"])
def test_lowers_for_cuda_as_one_kernel(
    head_dim: int, dtype: Any, page_dtype: Any, tuning: DecodeTuning
) -> None:
    spec = jax.ShapeDtypeStruct
    meta = decode_step(sequences=[(20, 1), (9, 1)]).meta
    args = (
        spec((2, 2, 5, head_dim), dtype),
        spec((9, 16, 2, 2, head_dim), page_dtype or dtype),
        meta,
        (spec((2, head_dim // 2), jnp.float32),) * 2,
        spec((2, 2), jnp.int32),
    )

    def fused(qkv, kv_pages, meta, rope, counters):
        return fused_decode_attention(
            qkv,
            kv_pages,
            meta,
            rope=rope,
            counters=counters,
            scale=0.25,
            window=9,
            soft_cap=3.0,
            tuning=tuning,
        )

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(fused, donate_argnums=(1, 4)).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call") == 1
    assert text.count("#stablehlo.output_operand_alias<") == 2  # pages and counters


def test_what_the_kernel_cannot_do_is_refused() -> None:
    step = decode_step(sequences=[(20, 1)], head_dim=24)
    with pytest.raises(ValueError, match="multiples of 16"):
        run(step, scale=0.2, tuning=WHOLE, interpret=True)
    spec = jax.ShapeDtypeStruct
    pages = spec((2**17, 16, 8, 2, 128), jnp.float8_e4m3fn)  # 4 GiB
    q, kv = spec((1, 8, 128), jnp.bfloat16), spec((1, 8, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="between 2 and 4 GiB"):
        jax.eval_shape(partial(decode_attention, scale=0.1), q, kv, kv, pages, step.meta)


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
    q, k, v = (np.asarray(jnp.asarray(x, dtype)) for x in (step.q, step.k, step.v))
    pages = np.asarray(jnp.asarray(step.kv_pages, page_dtype or dtype))
    return replace(step, q=q, k=k, v=v, kv_pages=pages)


def check(
    step: Step, *, tuning: DecodeTuning | None, interpret: bool, tolerance: float = 2e-5, **options: Any
) -> None:
    scale = step.q.shape[-1] ** -0.5
    want, want_pages = reference.paged_attention(
        step.q, step.k, step.v, step.kv_pages, step.meta, scale=scale, **options
    )
    out, pages = run(step, scale=scale, tuning=tuning, interpret=interpret, **options)
    assert out.dtype == step.q.dtype
    np.testing.assert_allclose(wide_array(out), wide_array(want), atol=tolerance, rtol=tolerance)
    assert not wide_array(out)[step.num_live :].any()
    # Page 0 too: padding rows write nothing.
    np.testing.assert_array_equal(wide_array(pages), wide_array(want_pages))


def run(step: Step, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    call = jax.jit(
        partial(decode_attention, **options), donate_argnums=3, compiler_options=quickly(options["interpret"])
    )
    out, pages = call(*(jnp.asarray(x) for x in (step.q, step.k, step.v, step.kv_pages)), step.meta)
    return np.asarray(out), np.asarray(pages)


def quickly(interpret: bool) -> dict[str, Any] | None:
    """An interpreted kernel is much code that runs once."""
    return {"xla_backend_optimization_level": 0} if interpret else None


def wide_array(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def written_slots(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Page and offset of each live row's new token."""
    rows = np.arange(step.num_live)
    positions = np.asarray(step.meta.positions)[rows]
    page_size = step.kv_pages.shape[1]
    return np.asarray(step.meta.page_table)[rows, positions // page_size], positions % page_size
