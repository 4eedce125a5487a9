"""Paged decode attention for NVIDIA GPUs: rope, KV write, attention and the sum over splits in one launch.

A program serves one kv head of one row, or one of several splits of its cached tokens (flash-decoding, Dao et al.
2023).  The step's own token never comes from memory: the first split holds it in registers, starts its softmax with
it and writes it to its page, so no program waits for another's write.  Splits leave unnormalised sums in scratch
memory; the last one of a row to finish, told by an atomic counter that it sets back to zero, adds them up.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.kernels_pallas.gpu_decode_kernel import MIN_TILE, DecodeArrays, DecodeSpec, decode_kernel
from jaxserve.kernels_pallas.heads import HeadNorms, RopeTable
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.scoring import Scoring
from jaxserve.kernels_pallas.tuning import DecodeTuning, decode_tuning


def decode_attention(
    qkv: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
    *,
    rope: RopeTable,
    counters: jax.Array,
    norms: HeadNorms | None = None,
    tuning: DecodeTuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """attention.attention for `meta.kind == "decode"`, from qkv [R, K, G + 2, H].

    `counters` [R, K] int32 are zeros, and zeros again when given back: hand them from layer to layer, so that no
    layer has to clear its own.  Returns the output [R, K * G, H], the pages and the counters, both updated in place.
    Padding rows give zeros and write nothing.
    """
    arrays = DecodeArrays(
        kv_pages=kv_pages,
        counters=counters,
        qkv=qkv,
        page_table=meta.page_table,
        kv_lens=meta.kv_lens,
        cos=rope.cos,
        sin=rope.sin,
        q_norm=None if norms is None else norms.q_scale,
        k_norm=None if norms is None else norms.k_scale,
    )
    return _launch(
        arrays, scoring, eps=0.0 if norms is None else norms.eps, tuning=tuning, interpret=interpret
    )


# Traced once for all layers of a step.
@partial(jax.jit, static_argnames=("scoring", "eps", "tuning", "interpret"))
def _launch(
    arrays: DecodeArrays, scoring: Scoring, *, eps: float, tuning: DecodeTuning | None, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_rows, num_kv_heads, columns, head_dim = arrays.qkv.shape
    group, page_dtype = columns - 2, arrays.kv_pages.dtype
    if head_dim % MIN_TILE:
        raise ValueError(f"head_dim is {head_dim}; the GPU decode kernel takes multiples of {MIN_TILE}")
    if tuning is None:
        tuning = decode_tuning(
            jax.devices()[0].device_kind,
            head_dim=head_dim,
            group=group,
            dtype=page_dtype.name,
            itemsize=page_dtype.itemsize,
            num_programs=num_rows * num_kv_heads,
        )
    spec = DecodeSpec(
        group=group,
        head_dim=head_dim,
        page_size=arrays.kv_pages.shape[1],
        dtype=arrays.qkv.dtype,
        scoring=scoring,
        eps=eps,
        tuning=tuning,
        interpret=interpret,
    )
    shape = jax.ShapeDtypeStruct
    outputs = [
        shape(arrays.kv_pages.shape, page_dtype),
        # Passed through where nothing is split, too: who threads them from layer to layer need not know.
        shape(arrays.counters.shape, arrays.counters.dtype),
        shape((num_rows, num_kv_heads * group, head_dim), spec.dtype),
    ]
    if tuning.num_splits > 1:
        lead = (num_rows, num_kv_heads, tuning.num_splits)
        num_heads = pl.next_power_of_2(group)
        outputs += [
            shape((*lead, num_heads, head_dim), jnp.float32),
            shape((*lead, 2, num_heads), jnp.float32),
        ]
    kv_pages, counters, out, *_ = pl.pallas_call(
        partial(decode_kernel, spec=spec),
        # Heads vary fastest: the heads of a token lie side by side in memory.
        grid=(num_kv_heads, tuning.num_splits, num_rows),
        out_shape=outputs,
        input_output_aliases={0: 0, 1: 1},
        compiler_params=pltriton.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(arrays)
    return out, kv_pages, counters
