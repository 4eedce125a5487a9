"""What changes logits before a token is drawn: the allowed-token mask, logit_bias, the three penalties."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.engine.sampler_state import COUNT_MASK, SamplerState
from jaxserve.engine.sampling_rows import SamplingRows


def apply_mask(logits: jax.Array, allowed_mask: jax.Array) -> jax.Array:
    """Logits [B, V] with -inf wherever allowed_mask [B, mask_words(V)] uint32 has a 0 bit."""
    batch, size = logits.shape
    bits = (allowed_mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [B, words, 32]
    return jnp.where(bits.reshape(batch, -1)[:, :size] != 0, logits, -jnp.inf)


def apply_state(logits: jax.Array, rows: SamplingRows, state: SamplerState, slot: jax.Array) -> jax.Array:
    """logit_bias, then the penalties, for rows that use the state; other rows [B, V] come back unchanged.

    Repetition (Keskar et al., 2019) divides positive logits of tokens seen in prompt or answer and multiplies
    negative ones; then frequency * count and presence, of the answer alone, are subtracted (OpenAI's
    formula).
    """
    row = jnp.arange(logits.shape[0])[:, None]
    x = logits.at[row, state.bias_ids[slot]].add(state.bias_values[slot])
    seen = state.tokens_seen[slot]  # [B, V]
    count = seen & COUNT_MASK
    repetition = rows.repetition[:, None]
    x = jnp.where(seen != 0, jnp.where(x > 0, x / repetition, x * repetition), x)
    x = (
        x
        - rows.frequency[:, None] * count.astype(jnp.float32)
        - jnp.where(count > 0, rows.presence[:, None], 0.0)
    )
    return jnp.where(rows.uses_state[:, None], x, logits)
