"""One step's sampling: logits in, token ids and the new sampler state out."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.engine import vocab_search
from jaxserve.engine.sampler_state import SamplerState
from jaxserve.engine.sampling_filters import Filters, draw, draw_filtered, draw_top_k
from jaxserve.engine.sampling_noise import row_keys
from jaxserve.engine.sampling_processors import apply_mask, apply_state
from jaxserve.engine.sampling_rows import SamplingRows, Variant, covers, has_processors
from jaxserve.engine.vocab_shards import VocabShards


def sample(
    logits: jax.Array,
    rows: SamplingRows,
    state: SamplerState,
    *,
    variant: Variant,
    on_cpu: bool,
    on_gpu: bool = False,
    shards: VocabShards | None = None,
) -> tuple[jax.Array, SamplerState]:
    """Choose a token per row of logits [B, V] float32: ids [B] int32.  To be jitted with `state` donated.

    variant: "greedy" takes the most likely token and reads no parameter; "temperature" draws; "random" also
    filters (min_p, top_k, top_p); "top_k" does so for rows that are greedy or have 1 <= top_k <= MAX_TOP_K,
    and never looks beyond each row's largest logits; "full" and "full_top_k" are "random" and "top_k" that
    also apply the mask, logit_bias and penalties, and count the sampled tokens. A row gets the same token
    from every variant that honours its parameters, up to rounding and to ties that number hundreds
    (sampling_filters.draw_top_k). on_cpu: branch at run time to skip what no row wants, which makes
    "top_k" the same as "random"; False gives straight-line code for accelerators, in which on_gpu puts a
    kernel for NVIDIA GPUs in the place of the filters, with the branches in it.

    The token depends on the row's logits, parameters, seed and position alone: not on the other rows, B, or
    the slot. Inactive rows get some valid id and write to the state's dummy row.  A row that allows no token
    at all gets token 0.

    Within `shards` the logits and the state's tokens_seen are this device's share; everything else is as without.
    """
    if rows.allowed_mask is not None and not has_processors(variant):
        raise ValueError(f"allowed_mask needs variant 'full' or 'full_top_k', got {variant!r}")
    slot = jnp.where(rows.is_active, rows.slot, state.num_slots)
    x = logits.astype(jnp.float32)
    if has_processors(variant):
        own = (rows, state) if shards is None else shards.own(rows, state)
        x = _process(x, *own, slot, on_cpu=on_cpu)
    if shards is None:
        ids = _choose(x, rows, variant, on_cpu=on_cpu, on_gpu=on_gpu)
    elif variant == "greedy":
        ids = shards.argmax(x, on_cpu=on_cpu)
    else:
        own_rows = shards.own_rows(replace(rows, allowed_mask=None))
        own_ids = _choose(shards.whole_rows(x), own_rows, variant, on_cpu=on_cpu, on_gpu=on_gpu)
        ids = shards.gather(own_ids, x.shape[0])

    state = replace(state, last_token=state.last_token.at[slot].set(ids))
    if has_processors(variant):
        counted = (rows.is_active & rows.uses_state).astype(jnp.int32)
        seen_ids = ids if shards is None else shards.local_ids(ids)
        state = replace(state, tokens_seen=state.tokens_seen.at[slot, seen_ids].add(counted))
    return ids, state


def _process(
    x: jax.Array, rows: SamplingRows, state: SamplerState, slot: jax.Array, *, on_cpu: bool
) -> jax.Array:
    if rows.allowed_mask is not None:
        x = apply_mask(x, rows.allowed_mask)
    if not on_cpu:
        return apply_state(x, rows, state, slot)
    return lax.cond(rows.uses_state.any(), lambda: apply_state(x, rows, state, slot), lambda: x)


def _choose(x: jax.Array, rows: SamplingRows, variant: Variant, *, on_cpu: bool, on_gpu: bool) -> jax.Array:
    if variant == "greedy":
        return vocab_search.argmax(x, on_cpu=on_cpu)
    keys = row_keys(rows.seed_lo, rows.seed_hi, rows.position)
    if variant == "temperature":
        return draw(x, rows.temperature, keys, on_cpu=on_cpu)
    filters = Filters(temperature=rows.temperature, top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p)
    if on_cpu or covers(variant, "random"):
        return draw_filtered(x, filters, keys, on_cpu=on_cpu, on_gpu=on_gpu)
    return draw_top_k(x, filters, keys)
