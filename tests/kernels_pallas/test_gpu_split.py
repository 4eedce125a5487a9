"""Splitting, norms, rope and writing pages in one kernel: interpreted anywhere, compiled where there is a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.kernels_pallas import gpu_split, xla
from jaxserve.kernels_pallas.heads import HeadNorms, RopeTable, split_heads
from tests.kernels_pallas.layouts import make_step
from tests.quick_compile import interpretable

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from 0.11 on
COMPILED = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
MODES = [pytest.param(True, id="interpreted"), pytest.param(False, id="compiled", marks=COMPILED)]
RAGGED = [(40, 1), (7, 1), (0, 10), (300, 6), (0, 1), (129, 45)]


def arguments(dtype: str, head_dim: int, group: int, with_norms: bool, padding: int = 5) -> tuple[Any, ...]:
    step = make_step(
        RAGGED, num_heads=2 * group, num_kv_heads=2, head_dim=head_dim, page_size=16, padding=padding
    )
    keys = jax.random.split(jax.random.key(head_dim), 4)
    num_tokens = step.q.shape[0]
    qkv = jax.random.normal(keys[0], (num_tokens, 2, group + 2, head_dim), dtype)
    angles = jax.random.uniform(keys[1], (num_tokens, head_dim // 2), maxval=6.3)
    rope = RopeTable(jnp.cos(angles), jnp.sin(angles))
    scales = [jax.random.normal(key, (head_dim,), dtype) for key in keys[2:]]
    norms = HeadNorms(scales[0], scales[1], 1e-6) if with_norms else None
    return qkv, jnp.asarray(step.kv_pages, dtype), step.meta, rope, norms


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "with_norms", "page_dtype"),
    [
        ("bfloat16", 128, 4, False, "bfloat16"),
        ("bfloat16", 64, 3, True, "float8_e4m3fn"),
        ("float32", 80, 1, True, "float32"),
        ("float16", 96, 2, False, "float16"),
        ("bfloat16", 256, 1, False, "float16"),
        ("float32", 16, 7, False, "float8_e5m2"),
    ],
)
def test_as_plain_operations(
    dtype: str, head_dim: int, group: int, with_norms: bool, page_dtype: str, interpret: bool
) -> None:
    qkv, pages, meta, rope, norms = arguments(dtype, head_dim, group, with_norms)
    pages = pages.astype(page_dtype)
    qkv = qkv.at[7, 0, -2:, 3].set(3e5 if page_dtype.startswith("float8") else 1.0)  # no page holds that much
    want_q, k, v = split_heads(qkv, rope, norms)
    want_pages = xla.write_kv(pages, k, v, meta)
    q, written = interpretable(gpu_split.split_and_write, interpret=interpret)(qkv, pages, meta, rope, norms)
    assert (q.dtype, written.dtype) == (want_q.dtype, want_pages.dtype)
    ulp, page_ulp = float(jnp.finfo(dtype).eps), float(jnp.finfo(page_dtype).eps)
    np.testing.assert_allclose(np.float32(q), np.float32(want_q), rtol=2 * ulp, atol=8 * ulp)
    # Page 0 takes what padding tokens write.
    np.testing.assert_allclose(
        np.float32(written[1:]), np.float32(want_pages[1:]), rtol=2 * page_ulp, atol=8 * ulp
    )
    assert np.isfinite(np.float32(written)).all()


@pytest.mark.parametrize("with_norms", [False, True])
def test_lowers_for_cuda_in_place(with_norms: bool) -> None:
    shapes: Any = jax.eval_shape(lambda: arguments("bfloat16", 128, 4, with_norms)[:2])
    _, _, meta, rope, norms = arguments("bfloat16", 128, 4, with_norms)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        call = jax.jit(lambda qkv, pages: gpu_split.split_and_write(qkv, pages, meta, rope, norms))
        text = call.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == 1
    assert "output_operand_aliases" in text
