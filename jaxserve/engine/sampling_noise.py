"""The sampler's randomness: Gumbel noise that is a pure function of (seed, position, token id).

No generator state and no dependence on shapes: the same entry gets the same noise in a vocabulary-wide pass,
in a short candidate list, or in a kernel, whatever the batch around it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def row_keys(seed_lo: jax.Array, seed_hi: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A 64-bit key per row, two words uint32 [B]: Threefry-2x32-20 of counter (position, 0) under the seed.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    schedule = (seed_lo, seed_hi, seed_lo ^ seed_hi ^ np.uint32(0x1BD11BDA))
    x0, x1 = position + schedule[0], schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0
        x0 = x0 + schedule[(block + 1) % 3]
        x1 = x1 + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return x0, x1


def gumbel(keys: tuple[jax.Array, jax.Array], token_ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise float32 [B, N] for token_ids [B or 1, N], keys of [B] rows; always finite."""
    return noise_of(keys[0][:, None], keys[1][:, None], token_ids)


def noise_of(key0: jax.Array, key1: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise float32 for token_ids under the two key words; all three broadcast.

    Adding it to log-weights and taking the maximum draws exactly from the softmax (Gumbel-max).  The uniform
    below has 62 bits towards 0, where a token of tiny probability needs them: -log1p(-u) is then an
    exponential variate good to full float32 precision at its small end, and no smaller than 2^-63.
    """
    high, low = _hash(key0, key1, token_ids.astype(jnp.uint32))
    uniform = _as_float31(high) * np.float32(2**-31) + (
        _as_float31(low) * np.float32(2**-62) + np.float32(2**-63)
    )
    exponential = -jnp.log1p(-jnp.minimum(uniform, np.float32(1 - 2**-24)))
    return -jnp.log(exponential)


def _hash(key0: jax.Array, key1: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two uint32 words per entry: a 32-bit avalanche of token + key0, then another of that + key1.

    Each is a multiply-xorshift permutation (constants: C. Wellons' hash-prospector, public domain), so for
    every token the map from the two key words to the two result words is a bijection: 64 uniform bits.
    """
    x = token_ids + key0
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    first = x ^ (x >> 16)
    x = first + key1
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15), first


def _as_float31(x: jax.Array) -> jax.Array:
    """The top 31 bits as float32; CPUs convert signed numbers faster than unsigned ones."""
    return lax.bitcast_convert_type(x >> 1, jnp.int32).astype(jnp.float32)
