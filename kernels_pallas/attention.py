"""Paged attention: write this step's keys and values into the cache, then attend to it.

The one door for models.  Who does the work is decided here, by the platform that the step is compiled for.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import xla
from jaxserve.kernels_pallas.heads import HeadNorms, RopeTable, split_heads
from jaxserve.kernels_pallas.matmul import has_numba
from jaxserve.kernels_pallas.metadata import AttentionMetadata, Backend

# Tokens of a mixed step from which the Hopper kernel is worth its compilation: programs that have it compile one by
# one, some 3 s each, as its compiler holds a lock.  With it from 128 tokens on the programs of Llama 8B took 43 s, from
# 4096 on 29 s (16 cores, H100, jax 0.11.2, 2026-11-25).
HOPPER_TOKENS = 2048


class StepScratch(NamedTuple):
    """What kernels of a step share from layer to layer; `attention` takes it and gives it back."""

    counters: jax.Array | None  # [R, K] int32, zeros between kernels: GPU decode's splits count themselves


def backend_of(platform: str, dtype: jax.typing.DTypeLike, head_dim: int) -> Backend:
    """Whose kernels are the fastest on `platform` for pages of `dtype`."""
    if platform in ("gpu", "cuda") and head_dim % 16 == 0:
        return "gpu"
    if platform == "cpu" and jnp.dtype(dtype) == jnp.float32 and has_numba():
        return "cpu"
    return "xla"


def make_ready(backend: Backend) -> None:
    """To be called before programs of `backend` are loaded from disk; tracing one does it, too."""
    if backend == "cpu":
        from jaxserve.kernels_pallas import cpu_attention, cpu_matmul

        cpu_attention.register()
        cpu_matmul.register()
    elif backend == "gpu" and _is_hopper():
        # Loads the library that serialised kernels look for; without it XLA compiles them once more.
        from jaxserve.kernels_pallas import gpu_prefill_mosaic  # noqa: F401


def start_step(meta: AttentionMetadata, num_kv_heads: int) -> StepScratch:
    """Scratch for the first layer of a step."""
    if meta.backend == "gpu" and meta.kind == "decode":
        return StepScratch(jnp.zeros((meta.kv_lens.shape[0], num_kv_heads), jnp.int32))
    return StepScratch(None)


def attention(
    qkv: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scratch: StepScratch,
    *,
    rope: RopeTable,
    norms: HeadNorms | None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array, StepScratch]:
    """Causal attention of a ragged batch of new tokens over each sequence's pages.

    qkv [T, K, G + 2, H]: of each kv head its G queries, its key and its value, before norms and rope.  kv_pages
    [P, S, K, 2, H], keys at index 0 and values at 1, are updated in place when donated.  A token sees the positions
    of its own sequence up to its own, at most the last `window` of them if given.  `soft_cap` c replaces a score s by
    c * tanh(s / c).  Returns the output [T, K * G, H] in qkv's dtype, the pages, and the scratch for the next layer.
    """
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if meta.backend == "gpu" and meta.kind == "decode":
        from jaxserve.kernels_pallas import gpu_decode

        assert scratch.counters is not None
        out, kv_pages, counters = gpu_decode.fused_decode_attention(
            qkv, kv_pages, meta, rope=rope, counters=scratch.counters, norms=norms, **options
        )
        return out, kv_pages, StepScratch(counters)
    if meta.backend == "gpu":
        from jaxserve.kernels_pallas import gpu_split

        q, kv_pages = gpu_split.split_and_write(qkv, kv_pages, meta, rope, norms)
        return _gpu_prefill(q, kv_pages).attend(q, kv_pages, meta, **options), kv_pages, scratch
    q, k, v = split_heads(qkv, rope, norms)
    out, kv_pages = paged_attention(q, k, v, kv_pages, meta, **options)
    return out, kv_pages, scratch


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attention` of queries and keys that are normalised and rotated: q [T, N, H], k and v [T, K, H]."""
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if meta.backend == "gpu":
        if meta.kind == "mixed":
            return _gpu_prefill(q, kv_pages).paged_attention(q, k, v, kv_pages, meta, **options)
        # Here, since Pallas' GPU parts cost a second to import, and CPUs need none of them.
        from jaxserve.kernels_pallas import gpu_decode

        return gpu_decode.decode_attention(q, k, v, kv_pages, meta, **options)
    kv_pages = xla.write_kv(kv_pages, k, v, meta)
    if meta.backend == "cpu":
        from jaxserve.kernels_pallas import cpu_attention

        return cpu_attention.attend(q, kv_pages, meta, **options), kv_pages
    return xla.attend(q, kv_pages, meta, **options), kv_pages


def _gpu_prefill(q: jax.Array, kv_pages: jax.Array) -> ModuleType:
    """The module whose `attend` and `paged_attention` are the fastest for mixed steps of these shapes and types."""
    from jaxserve.kernels_pallas import gpu_prefill

    if _is_hopper() and q.shape[0] >= HOPPER_TOKENS:
        from jaxserve.kernels_pallas import gpu_prefill_mosaic

        if gpu_prefill_mosaic.supports(q, kv_pages):
            return gpu_prefill_mosaic
    return gpu_prefill


def _is_hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability.startswith("9.")
