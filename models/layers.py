"""The parts that decoder families share: RMS norm, fused attention projections, gated feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.config import ModelConfig
from jaxserve.kernels_pallas.attention import StepScratch, attention
from jaxserve.kernels_pallas.heads import HeadNorms, RopeTable, rms_norm
from jaxserve.kernels_pallas.matmul import contract
from jaxserve.kernels_pallas.metadata import AttentionMetadata, Backend
from jaxserve.kernels_pallas.residual import add_norm, contract_parts, contract_share
from jaxserve.kernels_pallas.scoring import Scoring
from jaxserve.models.part import WHOLE, Part


def parameter(shape: tuple[int, ...], axes: tuple[str, ...], dtype: jnp.dtype) -> nnx.Param[jax.Array]:
    """A parameter without a value worth having yet; `axes` names each dimension, to lay a mesh over."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


_STORED_ROWS = 512  # activations of as many rows are written to memory between two products

# How many leading axes of a weight, by its name, products contract, and behind how many others they stand
# (matmul.to_rows): the engine stores weights as they are read.
CONTRACTED_AXES = {
    "qkv": (1, 0),
    "o": (2, 0),
    "gate_up": (1, 0),
    "down": (1, 0),
    "lm_head": (1, 0),
    "router": (1, 0),
    "expert_gate_up": (1, 1),
    "expert_down": (1, 1),
}


def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x[rows] along the first axis, for indices that the planner made: none is out of bounds."""
    return jnp.take(x, rows, axis=0, mode="clip")


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis."""

    def __init__(self, size: int, axis: str, eps: float, dtype: jnp.dtype) -> None:
        self.scale = parameter((size,), (axis,), dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)

    def add(self, x: jax.Array, parts: jax.Array | None, backend: Backend) -> tuple[jax.Array, jax.Array]:
        """x [T, D] plus the sum of parts [C, T, D], if there are any, and the norm of that."""
        if parts is None:
            return x, self(x)
        return add_norm(x, parts, self.scale.get_value(), self.eps, backend)


class Attention(nnx.Module):
    """Grouped-query self-attention over paged keys and values.

    The projections of queries, keys and values are one weight, [D, K, G + 2, H]: kv head k's G = N / K query
    heads (k * G .. k * G + G - 1), then its key, then its value, so that splitting K over devices keeps
    groups together.
    """

    def __init__(self, config: ModelConfig, window: int | None, dtype: jnp.dtype, part: Part = WHOLE) -> None:
        embed, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        head_dim, eps = config.head_dim, config.rms_norm_eps
        fused = (kv_heads, heads // kv_heads + 2, head_dim)
        fused_axes = ("kv_heads", "group", "head_dim")
        self.window = window
        self.part = part
        self.qkv = parameter((embed, *fused), ("embed", *fused_axes), dtype)
        self.qkv_bias = parameter(fused, fused_axes, dtype) if config.qkv_bias else None
        self.q_norm = RMSNorm(head_dim, "head_dim", eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, "head_dim", eps, dtype) if config.qk_norm else None
        self.o = parameter((heads, head_dim, embed), ("heads", "head_dim", "embed"), dtype)
        self.o_bias = parameter((embed,), ("embed",), dtype) if config.o_bias else None

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        rope: RopeTable,
        meta: AttentionMetadata,
        scratch: StepScratch,
        rows: jax.Array | None = None,
        *,
        scatter: bool = False,
    ) -> tuple[jax.Array, jax.Array, StepScratch]:
        """x [T, D] and this layer's pages [P, S, K, 2, H] to the output, the pages and the scratch.

        The output is in parts [C, T, D] to be summed, or of `rows` [R] alone, if they are given, [C, R, D].  With
        `scatter` every device gets its own rows of it.
        """
        qkv = contract(x, self.qkv[...], backend=meta.backend)  # [T, K, G + 2, H]
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = HeadNorms(self.q_norm.scale[...], self.k_norm.scale[...], self.q_norm.eps)
        out, kv_pages, scratch = attention(
            qkv,
            kv_pages,
            meta,
            scratch,
            Scoring(scale=qkv.shape[-1] ** -0.5, window=self.window),
            rope=rope,
            norms=norms,
        )
        if rows is not None:
            out = take_rows(out, rows)
        out = _contract_parts(out, self.o, 2, self.o_bias, meta.backend, self.part, scatter=scatter)
        return out, kv_pages, scratch


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), gate and up being one weight [D, 2, F]."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, part: Part = WHOLE) -> None:
        embed, ffn = config.hidden_size, config.intermediate_size
        self.part = part
        self.gate_up = parameter((embed, 2, ffn), ("embed", "gate_up", "ffn"), dtype)
        self.gate_up_bias = parameter((2, ffn), ("gate_up", "ffn"), dtype) if config.mlp_bias else None
        self.down = parameter((ffn, embed), ("ffn", "embed"), dtype)
        self.down_bias = parameter((embed,), ("embed",), dtype) if config.mlp_bias else None

    def __call__(self, x: jax.Array, backend: Backend, *, scatter: bool = False) -> jax.Array:
        """x [T, D] to parts [C, T, D] to be summed; with `scatter` every device gets its own rows of them."""
        gate_up = contract(x, self.gate_up[...], backend=backend)  # [T, 2, F]
        if self.gate_up_bias is not None:
            gate_up = gate_up + self.gate_up_bias[...]
        if x.dtype != jnp.float32 and x.shape[0] >= _STORED_ROWS:
            # Or XLA may have the product write float32, 0.9 GB a layer of Llama 8B instead of half, to spare itself the
            # widening below: by its size, what made a step ask an H100 for 1.69 GiB (jax 0.11.2, 2026-11-23).
            gate_up = jax.lax.optimization_barrier(gate_up)
        # float32 costs nothing here: the activation is fused between two GEMMs and never stored wide.
        gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
        gated = (jax.nn.silu(gate) * up).astype(x.dtype)
        return _contract_parts(gated, self.down, 1, self.down_bias, backend, self.part, scatter=scatter)


def _contract_parts(
    x: jax.Array,
    weight: nnx.Param[jax.Array],
    num_axes: int,
    bias: nnx.Param[jax.Array] | None,
    backend: Backend,
    part: Part,
    *,
    scatter: bool,
) -> jax.Array:
    """x times a weight that devices have by its rows, so that each gives a summand: parts [C, T, D] of all of them."""
    if bias is None and part.is_whole:
        return contract_parts(x, weight[...], num_axes, backend)
    out = part.add_up(contract_share(x, weight[...], num_axes, backend), scatter=scatter)
    return (out if bias is None else out + bias[...])[None]
