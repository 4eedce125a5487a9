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
from jaxserve.kernels_pallas.scoring import Scoring

# Tokens of a mixed step from which the Hopper kernel is worth its compilation: programs that have it compile one by
# one, some 3 s each, as its compiler holds a lock.  With it from 128 tokens on the programs of Llama 8B took 43 s, from
# 4096 on 29 s (16 cores, H100, jax 0.11.2, 2026-11-25).
HOPPER_TOKENS = 2048


class StepScratch(NamedTuple):
    """What kernels of a step share from layer to layer; `attention` takes it and gives it back."""

    counters: jax.Array | None  # [R, K] int32, zeros between kernels: GPU decode's splits count themselves


def backend_of(platform: str, head_dim: int) -> Backend:
    """Whose kernels are the fastest on `platform` for heads of `head_dim`."""
    if platform in ("gpu", "cuda") and head_dim % 16 == 0:
        return "gpu"
    if platform == "tpu":
        return "tpu"
    if platform == "cpu" and has_numba():
        return "cpu"
    return "xla"


def make_ready(backend: Backend, dtype: jax.typing.DTypeLike) -> None:
    """To be called before programs of `backend` are loaded from disk; tracing one does it, too."""
    if backend == "cpu" and jnp.dtype(dtype) == jnp.float32:
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
    scoring: Scoring,
    *,
    rope: RopeTable,
    norms: HeadNorms | None,
) -> tuple[jax.Array, jax.Array, StepScratch]:
    """Causal attention of a ragged batch of new tokens over each sequence's pages.

    qkv [T, K, G + 2, H]: of each kv head its G queries, its key and its value, before norms and rope.  kv_pages
    [P, S, K, 2, H], keys at index 0 and values at 1, are updated in place when donated; they may be narrower than
    qkv.  Returns the output [T, K * G, H] in qkv's dtype, the pages, and the scratch for the next layer.
    """
    # Kernels are imported where they are called, since Pallas' GPU parts cost a second, and CPUs need none of them.
    if meta.backend == "gpu" and meta.kind == "decode":
        from jaxserve.kernels_pallas import gpu_decode

        assert scratch.counters is not None
        out, kv_pages, counters = gpu_decode.decode_attention(
            qkv, kv_pages, meta, scoring, rope=rope, counters=scratch.counters, norms=norms
        )
        return out, kv_pages, StepScratch(counters)
    if meta.backend == "gpu":
        from jaxserve.kernels_pallas import gpu_split

        q, kv_pages = gpu_split.split_and_write(qkv, kv_pages, meta, rope, norms)
        return _gpu_prefill(q, kv_pages).attend(q, kv_pages, meta, scoring), kv_pages, scratch
    q, k, v = split_heads(qkv, rope, norms)
    if meta.backend == "tpu":
        from jaxserve.kernels_pallas import tpu_attention

        if tpu_attention.supports(q, kv_pages):
            kv_pages = tpu_attention.write_kv(kv_pages, k, v, meta)
            return tpu_attention.attend(q, kv_pages, meta, scoring), kv_pages, scratch
    kv_pages = xla.write_kv(kv_pages, k, v, meta)
    if meta.backend == "cpu" and q.dtype == kv_pages.dtype == jnp.float32:
        from jaxserve.kernels_pallas import cpu_attention

        return cpu_attention.attend(q, kv_pages, meta, scoring), kv_pages, scratch
    return xla.attend(q, kv_pages, meta, scoring), kv_pages, scratch


def _gpu_prefill(q: jax.Array, kv_pages: jax.Array) -> ModuleType:
    """The module whose `attend` is the fastest for mixed steps of these shapes and types."""
    from jaxserve.kernels_pallas import gpu_prefill

    if _is_hopper() and q.shape[0] >= HOPPER_TOKENS:
        from jaxserve.kernels_pallas import gpu_prefill_mosaic

        if gpu_prefill_mosaic.supports(q, kv_pages):
            return gpu_prefill_mosaic
    return gpu_prefill


def _is_hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability.startswith("9.")
