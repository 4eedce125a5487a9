"""Packing parameters into fewer arguments loses and moves nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.weight_pack import WeightPack


def test_small_leaves_of_one_shape_share_an_argument() -> None:
    leaves = [
        jnp.full((8,), 1.0),
        jnp.full((300, 300), 2.0),  # large: stands alone
        jnp.full((8,), 3.0),
        jnp.full((300, 300), 4.0),
        jnp.full((8,), 5.0, jnp.bfloat16),  # of another dtype
        jnp.full((2, 4), 6.0),  # of another shape
        jnp.full((8,), 7.0),
    ]
    plan = WeightPack.plan(leaves)
    packed = plan.pack(leaves)
    assert [(x.shape, x.dtype) for x in packed] == [(spec.shape, spec.dtype) for spec in plan.specs]
    assert sorted(x.shape for x in packed) == [(2, 4), (3, 8), (8,), (300, 300), (300, 300)]
    unpacked = jax.jit(lambda *arguments: plan.unpack(arguments))(*packed)
    for leaf, again in zip(leaves, unpacked, strict=True):
        assert leaf.dtype == again.dtype
        np.testing.assert_array_equal(leaf, again)


def test_leaves_that_stand_alone_are_not_copied() -> None:
    leaf = jnp.ones((300, 300))
    (packed,) = WeightPack.plan([leaf]).pack([leaf])
    assert packed is leaf
