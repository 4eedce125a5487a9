"""Log-probabilities of chosen tokens and of the most likely ones, from raw logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.engine import vocab_search
from jaxserve.engine.vocab_shards import VocabShards


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["logprob", "rank", "top_ids", "top_logprobs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Logprobs:
    """B positions, n alternatives each (n may be 0)."""

    logprob: jax.Array  # [B] float32, of the chosen token
    rank: jax.Array  # [B] int32, 1 + the number of tokens with a larger logit
    top_ids: jax.Array  # [B, n] int32, most likely first, lowest id first among equals
    top_logprobs: jax.Array  # [B, n] float32


def gather_logprobs(
    logits: jax.Array, token_ids: jax.Array, num_logprobs: int, shards: VocabShards | None = None
) -> Logprobs:
    """Logprobs of token_ids [B], within the vocabulary, and the num_logprobs likeliest under softmax(logits [B, V]).

    Within `shards` the logits are this device's share of each row.
    """
    if shards is not None:
        own = gather_logprobs(shards.whole_rows(logits), shards.own_rows(token_ids), num_logprobs)
        return shards.gather(own, logits.shape[0])
    logits = logits.astype(jnp.float32)
    largest = logits.max(-1, keepdims=True)
    log_total = jnp.log(jnp.exp(logits - largest).sum(-1, keepdims=True))  # [B, 1]
    chosen = jnp.take_along_axis(logits, token_ids[:, None].astype(jnp.int32), axis=1)  # [B, 1]
    top_values, top_ids = vocab_search.top_k(logits, num_logprobs)
    return Logprobs(
        logprob=((chosen - largest) - log_total)[:, 0],
        rank=1 + (logits > chosen).sum(-1, dtype=jnp.int32),
        top_ids=top_ids,
        top_logprobs=(top_values - largest) - log_total,
    )
