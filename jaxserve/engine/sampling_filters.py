"""Draw one token a row under temperature, min_p, top_k and top_p, exactly and without sorting the vocabulary.

Every filter keeps the tokens at or above some logit: ties are kept or dropped together, by value.  min_p
keeps p >= min_p * p_max; top_k those at or above the k-th largest; top_p, over what these two kept, those
with less than top_p of the mass strictly above them.  The most likely token always stays.

Noise is added in logit units, x + temperature * gumbel, so temperature 0 is the plain argmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.engine import sampling_gpu, vocab_search
from jaxserve.engine.sampling_noise import gumbel
from jaxserve.engine.sampling_rows import MAX_TOP_K

_NUM_CANDIDATES = 128  # on CPUs: filters that keep fewer tokens never look at the whole vocabulary again


@dataclass(frozen=True)
class Filters:
    """Parameters of B rows, each [B]; neutral values switch a filter off."""

    temperature: jax.Array  # float32, 0: greedy, and no filter matters
    top_k: jax.Array  # int32, below 1 or V and above: off
    top_p: jax.Array  # float32, 1: off
    min_p: jax.Array  # float32, 0: off


Keys = tuple[jax.Array, jax.Array]


def draw(x: jax.Array, temperature: jax.Array, keys: Keys, *, on_cpu: bool) -> jax.Array:
    """Token ids int32 [B] drawn from softmax(x [B, V] / temperature [B])."""
    return vocab_search.argmax(_scores(x, temperature, keys), on_cpu=on_cpu)


def draw_filtered(
    x: jax.Array, filters: Filters, keys: Keys, *, on_cpu: bool, on_gpu: bool = False
) -> jax.Array:
    """Token ids int32 [B] drawn from what the filters keep of x [B, V].

    on_cpu chooses branches at run time (rows without filters cost nothing, narrow sets little); on_gpu does so
    inside a kernel, where the CUDA graph does not see it; without either the code is one straight line.  All
    draw the same tokens, up to the rounding of top_p's sums and of the noise.
    """
    if on_cpu:
        return _draw_branching(x, filters, keys)
    if on_gpu and sampling_gpu.takes(x.shape[1]):
        slack = _min_p_floor(jnp.zeros_like(filters.min_p), filters)
        top_k = _clipped_k(filters, x.shape[1])
        return sampling_gpu.draw_rows(x, filters.temperature, top_k, filters.top_p, slack, keys)
    return _draw_straight(x, filters, keys)


def draw_top_k(x: jax.Array, filters: Filters, keys: Keys) -> jax.Array:
    """draw_filtered, straight-line, for rows that are greedy or have 1 <= top_k <= MAX_TOP_K.

    One pass over x [B, V], then all is done among a few thousand candidates a row.  These hold whatever is
    larger than the k-th largest logit.  Of what equals it they may hold only a part, that of the lowest
    groups of 64 ids, and only if more than 64 of these groups reach that logit: ties by the hundred, as of
    logits that are constant over long stretches.  draw_filtered would keep all of them.
    """
    values, ids = vocab_search.candidates(x, MAX_TOP_K)
    if ids is None:
        return _draw_straight(values, filters, keys)
    scores = _filtered_scores(values, filters, keys, ids)
    is_best = scores == scores.max(-1, keepdims=True)
    return jnp.where(is_best, ids, x.shape[1] - 1).min(-1)


def _draw_straight(x: jax.Array, filters: Filters, keys: Keys) -> jax.Array:
    return vocab_search.argmax(_filtered_scores(x, filters, keys), on_cpu=False)


def _filtered_scores(
    x: jax.Array, filters: Filters, keys: Keys, token_ids: jax.Array | None = None
) -> jax.Array:
    """_scores of what the filters keep of x [B, N], -inf elsewhere; straight-line."""
    best = x.max(-1)
    floor = vocab_search.find_threshold(
        x,
        None,
        _clipped_k(filters, x.shape[1]).astype(jnp.float32),
        _min_p_floor(best, filters),
        on_cpu=False,
    )
    weights = _weights(x, best, floor, filters)
    nucleus = vocab_search.find_threshold(x, weights, filters.top_p * weights.sum(-1), floor, on_cpu=False)
    threshold = jnp.where(filters.top_p < 1, nucleus, floor)
    return jnp.where(x >= threshold[:, None], _scores(x, filters.temperature, keys, token_ids), -jnp.inf)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "ids", "is_narrow", "threshold", "is_open", "target"],
    meta_fields=[],
)
@dataclass(frozen=True)
class _Settled:
    """What is known of B rows once their C largest logits were looked at."""

    values: jax.Array  # [B, C] float32, the candidates' logits
    ids: jax.Array  # [B, C] int32
    is_narrow: jax.Array  # [B] bool, every kept token is a candidate
    # [B] float32, smallest logit to keep; where is_open, what min_p and top_k alone keep
    threshold: jax.Array
    is_open: jax.Array  # [B] bool, top_p reaches past the candidates
    target: jax.Array  # [B] float32, the mass that top_p keeps, in units of _weights


def _draw_branching(x: jax.Array, filters: Filters, keys: Keys) -> jax.Array:
    """Draw among each row's largest logits if all rows' filters allow, else from the whole vocabulary."""
    batch, size = x.shape
    num = min(_NUM_CANDIDATES, size)
    has_filter = (filters.top_p < 1) | (filters.min_p > 0) | (_clipped_k(filters, size) < size)
    nothing_dropped = _Settled(
        values=jnp.zeros((batch, num), jnp.float32),
        ids=jnp.zeros((batch, num), jnp.int32),
        is_narrow=jnp.zeros(batch, bool),
        threshold=jnp.full(batch, -jnp.inf),
        is_open=jnp.zeros(batch, bool),
        target=jnp.zeros(batch, jnp.float32),
    )
    settled = lax.cond(
        (has_filter & (filters.temperature > 0)).any(),
        lambda: _settle(x, filters, num),
        lambda: nothing_dropped,
    )
    threshold = settled.threshold[:, None]

    def draw_narrow() -> jax.Array:
        scores = _scores(settled.values, filters.temperature, keys, settled.ids)
        scores = jnp.where(settled.values >= threshold, scores, -jnp.inf)
        is_best = scores == scores.max(-1, keepdims=True)
        return jnp.where(is_best, settled.ids, size - 1).min(-1)

    def draw_wide() -> jax.Array:
        scores = jnp.where(x >= threshold, _scores(x, filters.temperature, keys), -jnp.inf)
        winner = vocab_search.argmax(scores, on_cpu=True)
        return lax.cond(
            settled.is_open.any(), lambda: _redraw(x, scores, filters, settled, winner), lambda: winner
        )

    return lax.cond(settled.is_narrow.all(), draw_narrow, draw_wide)


def _settle(x: jax.Array, filters: Filters, num: int) -> _Settled:
    """Find each row's threshold among its `num` largest logits; only rows whose top_k is larger search on.

    A row's result never depends on the other rows; they only decide which of the wide passes run.
    """
    size = x.shape[1]
    values, ids = vocab_search.top_k(x, num)
    best, last = values[:, 0], values[:, -1]
    is_greedy = filters.temperature == 0

    def is_inside(threshold: jax.Array) -> jax.Array:  # are all tokens at or above it candidates?
        return (threshold > last) if num < size else jnp.ones_like(threshold, bool)

    k = _clipped_k(filters, size)
    kth = jnp.take_along_axis(values, jnp.minimum(k, num)[:, None] - 1, axis=1)[:, 0]
    floor = _min_p_floor(best, filters)
    floor = jnp.where(k <= num, jnp.maximum(floor, kth), floor)
    is_wide_k = (k > num) & (k < size) & ~is_inside(floor) & ~is_greedy
    floor = lax.cond(
        is_wide_k.any(),
        lambda: jnp.where(
            is_wide_k,
            vocab_search.find_threshold(x, None, k.astype(jnp.float32), floor, on_cpu=True),
            floor,
        ),
        lambda: floor,
    )

    wants_top_p = (filters.top_p < 1) & ~is_greedy
    weights = _weights(values, best, floor, filters)  # [B, C]
    total = weights.sum(-1)
    is_wide_total = wants_top_p & ~is_inside(floor)
    total = lax.cond(
        is_wide_total.any(),
        lambda: jnp.where(is_wide_total, _weights(x, best, floor, filters).sum(-1), total),
        lambda: total,
    )
    target = filters.top_p * total
    mass = jnp.cumsum(weights, axis=-1)
    num_kept = 1 + (mass[:, :-1] < target[:, None]).sum(-1, dtype=jnp.int32)
    nucleus = jnp.maximum(floor, jnp.take_along_axis(values, num_kept[:, None] - 1, axis=1)[:, 0])
    is_open = wants_top_p & ~is_inside(floor) & ~(mass[:, -1] >= target)
    threshold = jnp.where(wants_top_p & ~is_open, nucleus, floor)
    threshold = jnp.where(is_greedy, best, threshold)
    return _Settled(
        values=values,
        ids=ids,
        is_narrow=is_inside(threshold) & ~is_open,
        threshold=threshold,
        is_open=is_open,
        target=target,
    )


def _redraw(
    x: jax.Array, scores: jax.Array, filters: Filters, settled: _Settled, winner: jax.Array
) -> jax.Array:
    """Replace winners that top_p drops, in rows where its threshold is not known.

    A winner with `target` or more of the mass strictly above it is dropped with all tokens at or below its
    logit, and the best score of the rest wins: the same token as if the threshold had been applied first.  A
    draw is dropped with probability 1 - top_p at most, so this takes few rounds.
    """
    weights = _weights(x, x.max(-1), settled.threshold, filters)

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        winner, is_open = carry
        is_above = x > jnp.take_along_axis(x, winner[:, None], axis=1)
        is_dropped = is_open & (jnp.where(is_above, weights, 0.0).sum(-1) >= settled.target)
        rest = vocab_search.argmax(jnp.where(is_above, scores, -jnp.inf), on_cpu=True)
        return jnp.where(is_dropped, rest, winner), is_dropped

    return lax.while_loop(lambda carry: carry[1].any(), body, (winner, settled.is_open))[0]


def _scores(
    x: jax.Array, temperature: jax.Array, keys: Keys, token_ids: jax.Array | None = None
) -> jax.Array:
    if token_ids is None:
        token_ids = lax.broadcasted_iota(jnp.uint32, (1, x.shape[1]), 1)
    return x + temperature[:, None] * gumbel(keys, token_ids)


def _clipped_k(filters: Filters, size: int) -> jax.Array:
    return jnp.where(filters.top_k < 1, size, jnp.minimum(filters.top_k, size))


def _min_p_floor(best: jax.Array, filters: Filters) -> jax.Array:
    """The smallest logit that min_p keeps: p >= min_p * p_max, in logit units."""
    is_on = (filters.min_p > 0) & (filters.temperature > 0)
    log_min_p = jnp.log(jnp.where(is_on, filters.min_p, 1.0))
    return jnp.where(is_on, best + filters.temperature * log_min_p, -jnp.inf)


def _weights(x: jax.Array, best: jax.Array, floor: jax.Array, filters: Filters) -> jax.Array:
    """Unnormalised probabilities of the entries at or above `floor`, 0 elsewhere."""
    temperature = jnp.where(filters.temperature > 0, filters.temperature, 1.0)[:, None]
    return jnp.where(x >= floor[:, None], jnp.exp((x - best[:, None]) / temperature), 0.0)
