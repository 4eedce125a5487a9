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
from jaxserve.kernels_pallas.heads import HeadNorms
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.tuning import DecodeTuning, decode_tuning


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: jax.Array | None = None,
    tuning: DecodeTuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """attention.paged_attention for `meta.kind == "decode"`.

    kv_scales [K, 2] float32: what a stored key (index 0) or value (1) is multiplied by, for 8-bit pages.
    Padding rows give zeros and write nothing.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    arrays = DecodeArrays(
        kv_pages=kv_pages,
        counters=None,
        q=q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim),
        k=k[:, :, None],
        v=v[:, :, None],
        page_table=meta.page_table,
        kv_lens=meta.kv_lens,
        kv_scales=kv_scales,
    )
    out, kv_pages, _ = _launch(
        arrays,
        group=num_heads // num_kv_heads,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        eps=0.0,
        tuning=tuning,
        interpret=interpret,
    )
    return out, kv_pages


def fused_decode_attention(
    qkv: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    *,
    rope: tuple[jax.Array, jax.Array] | None,
    counters: jax.Array,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    norms: HeadNorms | None = None,
    kv_scales: jax.Array | None = None,
    tuning: DecodeTuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same from what the projection gives, qkv [R, K, G + 2, H]: a kv head's G queries, its key, its value.

    `rope` is cos and sin [R, H/2] float32 of each row's position; component i turns together with i + H/2.
    `counters` [R, K] int32 are zeros, and zeros again when given back: hand them from layer to layer, so that no
    layer has to clear its own.  Returns the output [R, K * G, H], the pages and the counters, both updated in place.
    """
    arrays = DecodeArrays(
        kv_pages=kv_pages,
        counters=counters,
        q=qkv,
        k=qkv,
        v=qkv,
        page_table=meta.page_table,
        kv_lens=meta.kv_lens,
        cos=None if rope is None else rope[0],
        sin=None if rope is None else rope[1],
        q_norm=None if norms is None else norms.q_scale,
        k_norm=None if norms is None else norms.k_scale,
        kv_scales=kv_scales,
    )
    out, kv_pages, new_counters = _launch(
        arrays,
        group=qkv.shape[2] - 2,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        eps=0.0 if norms is None else norms.eps,
        tuning=tuning,
        interpret=interpret,
    )
    assert new_counters is not None
    return out, kv_pages, new_counters


# Traced once for all layers of a step.
@partial(jax.jit, static_argnames=("group", "scale", "window", "soft_cap", "eps", "tuning", "interpret"))
def _launch(
    arrays: DecodeArrays,
    *,
    group: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    eps: float,
    tuning: DecodeTuning | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    num_rows, num_kv_heads, _, head_dim = arrays.q.shape
    page_dtype = arrays.kv_pages.dtype
    if head_dim % MIN_TILE:
        raise ValueError(f"head_dim is {head_dim}; the GPU decode kernel takes multiples of {MIN_TILE}")
    if page_dtype.itemsize == 1 and 2**31 < arrays.kv_pages.size <= 2**32:
        # Offsets are 32 bits wide up to 2**32 bytes, and signed.
        raise ValueError(
            "8-bit pages of one layer take between 2 and 4 GiB; the GPU decode kernel takes less or more"
        )
    if tuning is None:
        tuning = decode_tuning(
            jax.devices()[0].device_kind,
            head_dim=head_dim,
            group=group,
            dtype=page_dtype.name,
            itemsize=page_dtype.itemsize,
            num_programs=num_rows * num_kv_heads,
        )
    dtype = arrays.q.dtype
    packed = arrays.k.shape[2] > 1
    spec = DecodeSpec(
        group=group,
        head_dim=head_dim,
        page_size=arrays.kv_pages.shape[1],
        k_slot=group if packed else 0,
        v_slot=group + 1 if packed else 0,
        dtype=dtype,
        page_dtype=page_dtype,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        eps=eps,
        tuning=tuning,
        interpret=interpret,
    )
    shape = jax.ShapeDtypeStruct
    outputs = [
        shape(arrays.kv_pages.shape, page_dtype),
        shape((num_rows, num_kv_heads * group, head_dim), dtype),
    ]
    if tuning.num_splits > 1:
        if arrays.counters is None:
            arrays = arrays._replace(counters=jnp.zeros((num_rows, num_kv_heads), jnp.int32))
        lead = (num_rows, num_kv_heads, tuning.num_splits)
        num_heads = pl.next_power_of_2(group)
        outputs += [
            shape((*lead, num_heads, head_dim), jnp.float32),
            shape((*lead, 2, num_heads), jnp.float32),
        ]
    if arrays.counters is not None:
        # Passed through where nothing is split, too: who threads them from layer to layer need not know.
        outputs.insert(1, shape(arrays.counters.shape, arrays.counters.dtype))
    results = pl.pallas_call(
        partial(decode_kernel, spec=spec),
        # Heads vary fastest: the heads of a token lie side by side in memory.
        grid=(num_kv_heads, tuning.num_splits, num_rows),
        out_shape=outputs,
        input_output_aliases={0: 0} if arrays.counters is None else {0: 0, 1: 1},
        compiler_params=pltriton.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(arrays)
    if arrays.counters is None:
        return results[1], results[0], None
    return results[2], results[0], results[1]
