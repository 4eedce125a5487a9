"""Pages of keys and values [P, S, K, 2, H]: what they keep of a number, and how large a GPU lets them be."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_page(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x in the pages' dtype, cut off at the largest number that has: beyond it a cast would give NaN or infinity."""
    largest = float(jnp.finfo(dtype).max)
    if largest < float(jnp.finfo(x.dtype).max):
        # Wide, since bfloat16 has no number for float16's largest.
        x = jnp.clip(x.astype(jnp.float32), -largest, largest)
    return x.astype(dtype)


def most_pages(elements: int, dtype: jax.typing.DTypeLike) -> tuple[int, int]:
    """A layer's pages of `elements` numbers each that GPU kernels cannot address: above the first, up to the second.

    Pallas' Triton code counts elements in 32 bits, with a sign, up to 2**32 bytes, and in 64 bits beyond.
    """
    return 2**31 // elements, 2**32 // (elements * jnp.dtype(dtype).itemsize)
