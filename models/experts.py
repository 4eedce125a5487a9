"""The feed-forward of mixture-of-experts models: a router, and experts of which every token takes a few."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.config import ExpertsConfig
from jaxserve.kernels_pallas.experts import mixture, route
from jaxserve.kernels_pallas.matmul import contract
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.models.layers import parameter
from jaxserve.models.part import WHOLE, Part


class ExpertsMLP(nnx.Module):
    """The sum of what a token's experts give, each a gated feed-forward, weighted by the router's probabilities.

    All experts' gates and ups are one weight, [E, D, 2F], in which they take turns column by column, and their downs
    another, [E, F, D]: two grouped products a layer.  Every device has the whole router, whichever experts it has.
    """

    def __init__(self, embed: int, experts: ExpertsConfig, dtype: jnp.dtype, part: Part = WHOLE) -> None:
        self.part = part
        self.num_experts = experts.num_experts
        count, ffn = part.num_experts or experts.num_experts, experts.intermediate_size
        self.num_per_token = experts.num_per_token
        self.renormalize = experts.renormalize
        self.router = parameter((embed, experts.num_experts), ("embed", "routes"), dtype)
        # With an axis for gate and up, TPUs would copy it all for every ragged product (compiled for v6e, jax 0.10.2,
        # 2026-11-25).
        gate_up_axes = ("expert", "embed", "expert_gate_up")
        self.expert_gate_up = parameter((count, embed, 2 * ffn), gate_up_axes, dtype)
        self.expert_down = parameter((count, ffn, embed), ("expert", "expert_ffn", "embed"), dtype)

    def __call__(
        self, x: jax.Array, is_live: jax.Array, backend: Backend, *, scatter: bool = False
    ) -> jax.Array:
        """x [T, D] to parts [C, T, D] to be summed; of tokens that are not `is_live` [T], zeros.

        With `scatter` every device gets its own rows of them.
        """
        # float32: of logits rounded to bfloat16, neighbours would tie.
        logits = contract(x, self.router[...], backend=backend, out_dtype=jnp.dtype(jnp.float32))
        routing = route(logits, is_live, self.num_per_token, backend, renormalize=self.renormalize)
        routing = routing._replace(ids=self.part.own_experts(routing.ids, self.num_experts))
        parts = mixture(x, routing, self.expert_gate_up[...], self.expert_down[...], backend)
        if self.part.is_whole:
            return parts
        share = jnp.sum(parts, axis=0, dtype=jnp.float32).astype(x.dtype)
        return self.part.add_up(share, scatter=scatter)[None]
