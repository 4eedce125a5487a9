"""Sampling said plainly: numpy, float64, full sorts.  And the set-up that the sampling tests share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.sampler_state import SamplerState, init_state
from jaxserve.engine.sampling import sample
from jaxserve.engine.sampling_noise import gumbel, row_keys
from jaxserve.engine.sampling_rows import (
    NUM_FLOATS,
    NUM_INTS,
    SamplingRows,
    Variant,
    fill_padding,
    fill_row,
    needs_state,
)
from jaxserve.sampling_params import SamplingParams


def kept_tokens(logits: np.ndarray, params: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """Which tokens [V] bool the filters leave; `slack` loosens (above 0) or tightens the p thresholds."""
    x = logits.astype(np.float64)
    if params.is_greedy:
        return np.arange(len(x)) == np.argmax(x)
    probs = _softmax(x / params.temperature)
    kept = np.isfinite(x)
    if params.min_p > 0:
        kept &= (probs >= params.min_p * probs.max() * (1 - slack)) | (x == x.max())
    if 0 < params.top_k < kept.sum():
        kept &= x >= np.sort(x[kept])[-params.top_k]
    if params.top_p < 1:
        probs = np.where(kept, probs, 0)
        probs /= probs.sum()
        order = np.argsort(-x, kind="stable")
        mass_before = np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])
        # Ties share the mass before the first of them.
        values, first = np.unique(-x[order], return_index=True)
        above = mass_before[first][np.searchsorted(values, -x)]
        kept &= above < params.top_p * (1 + slack)
    return kept


def scores(logits: np.ndarray, params: SamplingParams, position: int) -> np.ndarray:
    """x + temperature * noise, float64 [V]: the kept token with the largest is the one to be sampled."""
    assert params.seed is not None
    seed = params.seed & (2**64 - 1)
    words = [np.array([w], np.uint32) for w in (seed & 0xFFFFFFFF, seed >> 32, position)]
    keys = row_keys(*(jnp.asarray(word) for word in words))
    noise = np.asarray(_gumbel(keys, len(logits)), np.float64)[0]
    return logits.astype(np.float64) + (0.0 if params.is_greedy else params.temperature) * noise


@lru_cache
def _jitted_gumbel(size: int):
    return jax.jit(lambda keys: gumbel(keys, jnp.arange(size)[None]))


def _gumbel(keys: tuple[jax.Array, jax.Array], size: int) -> jax.Array:
    return _jitted_gumbel(size)(keys)


def penalised(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> np.ndarray:
    """logit_bias, then vLLM's penalties, token by token."""
    x = logits.astype(np.float64).copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(prompt) | set(output):
        x[token] = (
            x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        )
    for token in set(output):
        x[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    return x


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(x))


@lru_cache
def compiled(variant: Variant, on_cpu: bool = True):
    """`sample` as programs have it: jitted, the state donated."""

    def run(logits: jax.Array, rows: SamplingRows, state: SamplerState) -> tuple[jax.Array, SamplerState]:
        return sample(logits, rows, state, variant=variant, on_cpu=on_cpu)

    return jax.jit(run, donate_argnums=2)


def make_rows(
    params: Sequence[SamplingParams],
    positions: Sequence[int] | None = None,
    *,
    slots: Sequence[int] | None = None,
    num_slots: int | None = None,
    bucket: int | None = None,
    allowed_mask: np.ndarray | None = None,
) -> SamplingRows:
    """Rows for these sequences, padded to `bucket`."""
    count = len(params)
    bucket = bucket or count
    ints, floats = np.empty((bucket, NUM_INTS), np.int32), np.empty((bucket, NUM_FLOATS), np.float32)
    for row, (p, slot) in enumerate(zip(params, slots or range(count), strict=True)):
        position = positions[row] if positions is not None else 0
        fill_row(
            ints, floats, row, p, slot=slot, position=position, is_active=True, uses_state=needs_state(p)
        )
    fill_padding(ints[count:], floats[count:], num_slots if num_slots is not None else count)
    mask = None if allowed_mask is None else jnp.asarray(allowed_mask)
    return SamplingRows(jnp.asarray(ints), jnp.asarray(floats), mask)


def sampled_ids(
    logits: np.ndarray,
    params: Sequence[SamplingParams],
    positions: Sequence[int] | None = None,
    *,
    variant: Variant = "random",
    on_cpu: bool = True,
    allowed_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Ids [B] sampled from logits [B, V], fresh state; padded to few buckets: compiling takes time."""
    count, size = logits.shape
    bucket = next(b for b in (8, 64, 512, 20_000) if b >= count)
    if allowed_mask is not None:
        allowed_mask = np.pad(allowed_mask, ((0, bucket - count), (0, 0)))
    rows = make_rows(params, positions, bucket=bucket, num_slots=bucket, allowed_mask=allowed_mask)
    padded = np.pad(logits.astype(np.float32), ((0, bucket - count), (0, 0)))
    ids, _ = compiled(variant, on_cpu)(jnp.asarray(padded), rows, init_state(bucket, size))
    return np.asarray(ids)[:count]
