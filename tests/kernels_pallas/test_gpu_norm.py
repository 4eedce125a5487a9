"""Addition and norm in one kernel against plain operations: interpreted anywhere, compiled where there is a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.kernels_pallas import gpu_norm
from jaxserve.kernels_pallas.residual import StackedRow, add_norm, contract_parts, contract_share, split_of
from tests.quick_compile import interpretable

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from 0.11 on
COMPILED = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
MODES = [pytest.param(True, id="interpreted"), pytest.param(False, id="compiled", marks=COMPILED)]
EPS = 1e-5


def arguments(num_rows: int, size: int, num_parts: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(size + num_rows), 3)
    part_dtype = dtype if num_parts == 1 else "float32"
    parts = jax.random.normal(keys[1], (num_parts, num_rows, size), part_dtype)
    x, scale = jax.random.normal(keys[0], (num_rows, size), dtype), jax.random.normal(keys[2], (size,), dtype)
    return x, parts, scale


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("num_rows", "size", "num_parts"),
    [(1, 4096, 8), (1, 576, 1), (3, 8192, 2), (5, 1536, 4), (130, 64, 1), (129, 5120, 2), (7, 2048, 1)],
)
def test_as_plain_operations(num_rows: int, size: int, num_parts: int, dtype: str, interpret: bool) -> None:
    x, parts, scale = arguments(num_rows, size, num_parts, dtype)
    stack, row = jnp.stack([jnp.zeros_like(scale), scale, scale + 1]), jnp.ones(1, jnp.int32)
    total, normed = interpretable(gpu_norm.add_norm, interpret=interpret, eps=EPS)(x, parts, stack, row)
    np.testing.assert_array_equal(StackedRow(stack, row)[...], scale)
    expected_total, expected = add_norm(x, parts, scale, EPS, "xla")
    assert (total.dtype, normed.dtype) == (x.dtype, x.dtype)
    # Sums in another order: the last bit of a part's sum may fall otherwise, in few of the values.
    ulp = float(jnp.finfo(dtype).eps)
    if num_parts <= 2:
        np.testing.assert_array_equal(total, expected_total)
    else:
        np.testing.assert_allclose(np.float32(total), np.float32(expected_total), atol=16 * ulp, rtol=ulp)
    np.testing.assert_allclose(np.float32(normed), np.float32(expected), atol=16 * ulp, rtol=2 * ulp)


def test_large_values_neither_overflow_nor_vanish() -> None:
    x = jnp.full((1, 576), 1e18, jnp.bfloat16)
    scales, row = jnp.ones((1, 576), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    total, normed = gpu_norm.add_norm(x, -x[None] / 2, scales, row, eps=EPS, interpret=True)
    np.testing.assert_allclose(np.float32(total), 0.5e18, rtol=1e-2)
    np.testing.assert_allclose(np.float32(normed), 1.0, rtol=1e-2)


@pytest.mark.parametrize("num_tokens", [2, 32, 256])
def test_parts_add_up_to_the_product(num_tokens: int) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (num_tokens, 4, 512), "bfloat16")
    weight = jax.random.normal(keys[1], (4, 512, 96), "bfloat16")
    parts = contract_parts(x, weight, 2, "gpu")
    assert parts.shape == (split_of(num_tokens, 2048, 96), num_tokens, 96)
    assert parts.shape[0] > 1
    (whole,) = contract_parts(x, weight, 2, "xla")
    np.testing.assert_allclose(np.float32(parts.sum(0)), np.float32(whole), rtol=1e-2, atol=0.3)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_devices_share_is_the_product(num_tokens: int, dtype: str) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (num_tokens, 4, 512), dtype)
    weight = jax.random.normal(keys[1], (4, 512, 96), dtype)
    share = contract_share(x, weight, 2, "gpu")
    assert (share.shape, share.dtype) == ((num_tokens, 96), x.dtype)
    whole = np.einsum("tnh,nhd->td", np.float64(x), np.float64(weight))
    np.testing.assert_allclose(
        np.float64(share), whole, rtol=1e-2 if dtype == "bfloat16" else 1e-4, atol=1e-2
    )


@pytest.mark.parametrize("num_inputs", [576, 1536, 4096, 14336])
def test_every_product_is_split_evenly_and_large_ones_not_at_all(num_inputs: int) -> None:
    splits = [split_of(num_tokens, num_inputs, 4096) for num_tokens in (2, 16, 64, 256, 1024, 8192)]
    assert all(num_inputs % split == 0 for split in splits)
    assert splits == sorted(splits, reverse=True)
    assert splits[-1] == 1


@pytest.mark.parametrize(("num_rows", "size", "num_parts"), [(1, 4096, 8), (256, 8192, 2), (512, 576, 1)])
def test_lowers_for_cuda(num_rows: int, size: int, num_parts: int) -> None:
    shapes: Any = jax.eval_shape(lambda: arguments(num_rows, size, num_parts, "bfloat16"))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda x, parts, scale: add_norm(x, parts, scale, EPS, "gpu")).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == (num_rows < 512)  # many are left to XLA and cuBLAS
