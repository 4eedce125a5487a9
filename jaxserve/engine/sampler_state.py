"""What the sampler remembers between steps, on the device, one row a sequence slot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.sampling_params import MAX_LOGIT_BIAS

PROMPT_BIT = 1 << 28  # of tokens_seen: the token occurs in the prompt
COUNT_MASK = PROMPT_BIT - 1  # of tokens_seen: how often the token was generated


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["last_token", "tokens_seen", "bias_ids", "bias_values"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplerState:
    """Donated through every call.  R = num_slots + 1 rows: the last is a dummy that padding rows write to."""

    last_token: jax.Array  # [R] int32, the token sampled last: the next step reads it on the device
    tokens_seen: jax.Array  # [R, V] int32, PROMPT_BIT | count among the generated tokens
    bias_ids: jax.Array  # [R, MAX_LOGIT_BIAS] int32
    bias_values: jax.Array  # [R, MAX_LOGIT_BIAS] float32; unused entries add 0.0 to token 0

    @property
    def num_slots(self) -> int:
        return self.last_token.shape[0] - 1


def init_state(num_slots: int, vocab_size: int) -> SamplerState:
    """A state in which no slot was admitted."""
    rows = num_slots + 1
    return SamplerState(
        last_token=jnp.zeros(rows, jnp.int32),
        tokens_seen=jnp.zeros((rows, vocab_size), jnp.int32),
        bias_ids=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.int32),
        bias_values=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.float32),
    )


def admit_chunk(
    state: SamplerState,
    slot: jax.Array,
    token_ids: jax.Array,
    num_prompt: jax.Array,
    num_valid: jax.Array,
    is_first: jax.Array,
    bias_ids: jax.Array,
    bias_values: jax.Array,
) -> SamplerState:
    """Tell a slot about C tokens of the sequence that takes it: its prompt, then what it generated before.

    slot [] int32; token_ids [C] int32: entries below num_prompt [] are prompt tokens, from there up to
    num_valid [] generated ones, the rest padding.  is_first [] bool forgets the slot's former sequence.
    bias_ids int32 and bias_values float32 [MAX_LOGIT_BIAS] (sampling_rows.bias_arrays) replace the slot's, in
    every chunk. Ids outside the vocabulary (placeholders of images) are left out.
    """
    vocab_size = state.tokens_seen.shape[1]
    index = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    in_vocabulary = (token_ids >= 0) & (token_ids < vocab_size)
    prompt_ids = jnp.where(in_vocabulary & (index < num_prompt), token_ids, vocab_size)  # vocab_size: dropped
    is_output = in_vocabulary & (index >= num_prompt) & (index < num_valid)
    output_ids = jnp.where(is_output, token_ids, vocab_size)

    seen = jnp.where(is_first, 0, state.tokens_seen[slot])  # [V]
    in_prompt = jnp.zeros_like(seen).at[prompt_ids].set(PROMPT_BIT, mode="drop")
    seen = (seen | in_prompt).at[output_ids].add(1, mode="drop")
    return replace(
        state,
        tokens_seen=state.tokens_seen.at[slot].set(seen),
        bias_ids=state.bias_ids.at[slot].set(bias_ids),
        bias_values=state.bias_values.at[slot].set(bias_values),
    )
