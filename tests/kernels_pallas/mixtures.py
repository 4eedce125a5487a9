"""Random mixtures of experts: tokens, who takes which expert, and the experts' weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas import reference


class Mixture(NamedTuple):
    """Arguments of experts.mixture, and what the parts must add up to."""

    x: jax.Array  # [T, D]
    ids: jax.Array  # [T, C]
    weights: jax.Array  # [T, C]
    gate_up: jax.Array  # [E, D, 2F]
    down: jax.Array  # [E, F, D]
    expected: np.ndarray  # [T, D] float32


def make_mixture(
    ids: np.ndarray,
    num_experts: int,
    *,
    embed: int = 32,
    ffn: int = 48,
    dtype: str = "float32",
    seed: int = 0,
) -> Mixture:
    """Tokens that take the experts `ids` [T, C], in which `num_experts` is nobody."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, fan_in: int = 1) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * fan_in**-0.5, dtype)

    x = normal(ids.shape[0], embed)
    weights = jnp.asarray(rng.random(ids.shape, np.float32))
    gate_up, down = (
        normal(num_experts, embed, 2 * ffn, fan_in=embed),
        normal(num_experts, ffn, embed, fan_in=ffn),
    )
    arrays = [np.asarray(array) for array in (x, ids, weights, gate_up, down)]
    return Mixture(x, jnp.asarray(ids, jnp.int32), weights, gate_up, down, reference.mixture(*arrays))


def choices(num_tokens: int, per_token: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Different experts for each token, at random: ids [T, C]."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_experts)[:per_token] for _ in range(num_tokens)])


NUM_EXPERTS = 9
# Of one shape, so that they share one compilation: ids of 24 tokens' two choices.
CASES: dict[str, np.ndarray] = {
    "ragged": choices(24, 2, NUM_EXPERTS),
    "one expert has all": np.stack([np.full(24, 2), np.full(24, NUM_EXPERTS)], axis=1),
    "most have none": np.stack([np.full(24, 1), np.full(24, 8)], axis=1),
    "padding": np.concatenate([choices(10, 2, NUM_EXPERTS, seed=1), np.full((14, 2), NUM_EXPERTS)]),
    "padding alone": np.full((24, 2), NUM_EXPERTS),
    "foreign experts": choices(24, 2, 20, seed=2) - 5,  # as where others are on other devices
}
