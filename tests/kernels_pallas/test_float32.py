"""float32 is multiplied as float32 in every GPU kernel: Triton would take tf32, of 10 bits, unless told otherwise."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.kernels_pallas.attention import attention, start_step
from jaxserve.kernels_pallas.scoring import Scoring
from tests.kernels_pallas.layouts import make_step, packed, unturned
from tests.kernels_pallas.lowering import lower_for, triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


@pytest.mark.parametrize("page_dtype", [jnp.float32, jnp.float8_e4m3fn], ids=lambda x: x.dtype.name)
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_kernels_multiply_float32(decode: bool, page_dtype: Any) -> None:
    step = make_step([(5, 1), (30, 1 if decode else 9)], decode=decode, head_dim=64)
    step = replace(step, meta=replace(step.meta, backend="gpu"))
    pages = jax.ShapeDtypeStruct(step.kv_pages.shape, page_dtype)
    call = partial(attention, scoring=Scoring(0.125), rope=unturned(step), norms=None)
    lowered = lower_for("cuda", call, packed(step), pages, step.meta, start_step(step.meta, 2))
    products = [
        line for text in triton_kernels(lowered).values() for line in text.splitlines() if "tt.dot" in line
    ]
    assert products
    assert not [line for line in products if "tf32" in line]


def test_a_product_without_precision_would_be_found() -> None:
    def multiply(a_ref: Any, b_ref: Any, out_ref: Any) -> None:
        out_ref[...] = a_ref[...] @ b_ref[...]

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    call = pl.pallas_call(
        multiply,
        out_shape=x,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        name="multiply",
    )
    assert "tf32" in triton_kernels(lower_for("cuda", call, x, x))["multiply"]
