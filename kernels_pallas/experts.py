"""Mixtures of experts: which experts a token takes, and the weighted sum of what they give.

The one door for models.  On GPUs kernels do all of it but the router's product; elsewhere tokens are sorted by expert,
and two grouped products (grouped_matmul) with plain operations around them do.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.grouped_matmul import grouped_matmul
from jaxserve.kernels_pallas.metadata import Backend

_MANY_TOKENS = 512  # of which float32 parts would be a gigabyte and more


class Routing(NamedTuple):
    """The experts of each token."""

    ids: jax.Array  # [T, C] int32; any number but 0 .. E - 1 is nobody
    weights: jax.Array  # [T, C] float32


def make_ready(backend: Backend, dtype: jax.typing.DTypeLike) -> None:
    """To be called before programs of `backend` are loaded from disk; tracing one does it, too."""
    if backend == "cpu" and jnp.dtype(dtype) == jnp.float32:
        from jaxserve.kernels_pallas import cpu_grouped_matmul

        cpu_grouped_matmul.register()


def route(
    logits: jax.Array, is_live: jax.Array, num_per_token: int, backend: Backend, *, renormalize: bool
) -> Routing:
    """The `num_per_token` likeliest experts of logits [T, E] float32, of equal ones the first.

    Their weights are the probabilities, scaled to a sum of 1 if `renormalize`.  Tokens that are not `is_live` [T] get
    nobody: no expert is read for the sake of padding.
    """
    if backend == "gpu":
        from jaxserve.kernels_pallas import gpu_experts

        is_live = is_live.astype(jnp.int32)
        return Routing(*gpu_experts.route(logits, is_live, num_per_token, renormalize=renormalize))
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), num_per_token)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(jnp.where(is_live[:, None], ids, logits.shape[1]), weights)


def mixture(
    x: jax.Array, routing: Routing, gate_up: jax.Array, down: jax.Array, backend: Backend
) -> jax.Array:
    """x [T, D] through each token's experts, as parts [P, T, D] whose sum is the weighted sum of what they give.

    Expert e computes down[e](silu(gate) * up).  x times gate_up[e], of [E, D, 2F], gives gate and up in turns, so that
    any share of the columns is a whole one; down is [E, F, D].

    Nobody gives zeros.  Only experts that somebody takes are read.  On a GPU P is C, elsewhere 1.  Several parts of few
    tokens are float32, unrounded; otherwise they are of x's dtype.
    """
    num_tokens, per_token = routing.ids.shape
    num_experts, size, embed = down.shape
    if backend == "gpu":
        from jaxserve.kernels_pallas import gpu_experts

        if gpu_experts.supports(embed, size):
            is_wide = per_token > 1 and num_tokens < _MANY_TOKENS
            out_dtype = jnp.dtype(jnp.float32) if is_wide else x.dtype
            return gpu_experts.mixture(x, *routing, gate_up, down, out_dtype=out_dtype)
    # Nobody's rows come last, as those of one expert more.
    is_somebody = (routing.ids >= 0) & (routing.ids < num_experts)
    ids = jnp.where(is_somebody, routing.ids, num_experts).reshape(-1)
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.sum(ids[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    rows = jnp.take(x, order // per_token, axis=0, mode="clip")
    pairs = _wide(grouped_matmul(rows, gate_up, sizes, backend)).reshape(-1, size, 2)
    gated = (jax.nn.silu(pairs[..., 0]) * pairs[..., 1]).astype(x.dtype)
    out = grouped_matmul(gated, down, sizes, backend)
    place = jnp.argsort(order)
    out = _wide(jnp.take(out, place, axis=0, mode="clip")).reshape(num_tokens, per_token, -1)
    return jnp.sum(out * routing.weights[..., None], axis=1).astype(x.dtype)[None]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
