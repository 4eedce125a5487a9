"""Random ragged steps over random pages, as the engine would lay them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.heads import RopeTable
from jaxserve.kernels_pallas.metadata import AttentionMetadata


@dataclass(frozen=True)
class Step:
    """Arguments of reference.paged_attention."""

    q: np.ndarray  # [T, N, H]
    k: np.ndarray  # [T, K, H]
    v: np.ndarray  # [T, K, H]
    kv_pages: np.ndarray  # [P, S, K, 2, H]
    meta: AttentionMetadata
    num_live: int  # leading tokens that are not padding


def cast(step: Step, dtype: Any) -> Step:
    """The same numbers in another type."""
    return replace(step, **{name: getattr(step, name).astype(dtype) for name in ("q", "k", "v", "kv_pages")})


def packed(step: Step) -> np.ndarray:
    """q, k and v as a projection gives them: [T, K, G + 2, H]."""
    num_tokens, num_kv_heads, head_dim = step.k.shape
    queries = step.q.reshape(num_tokens, num_kv_heads, -1, head_dim)
    return np.concatenate([queries, step.k[:, :, None], step.v[:, :, None]], axis=2)


def unturned(step: Step) -> RopeTable:
    """Angles of zero: heads stay as they are, to the bit."""
    shape = (step.q.shape[0], step.q.shape[2] // 2)
    return RopeTable(jnp.ones(shape), jnp.zeros(shape))


def make_step(
    sequences: list[tuple[int, int]],
    *,
    decode: bool = False,
    padding: int = 0,
    padding_rows: int = 1,
    page_size: int = 8,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    tile_size: int = 4,
    seed: int = 0,
) -> Step:
    """A step of `sequences`, (tokens in the cache before, new tokens) each, and `padding` tokens behind them."""
    rng = np.random.default_rng(seed)
    num_rows = len(sequences) + (padding if decode else padding_rows)
    max_pages = max(-(-(old + new) // page_size) for old, new in sequences) + 2
    num_pages = 1 + len(sequences) * max_pages
    num_live = sum(new for _, new in sequences)
    num_tokens = num_live + padding
    pages = rng.permutation(np.arange(1, num_pages))
    table = np.zeros((num_rows, max_pages), np.int32)
    positions = np.zeros(num_tokens, np.int32)
    rows = np.full(num_tokens, num_rows - 1, np.int32)
    kv_lens = np.zeros(num_rows, np.int32)
    starts = np.full(num_rows + 1, num_live, np.int32)
    tile_rows, tile_starts = [], []
    token = 0
    for row, (old, new) in enumerate(sequences):
        used = -(-(old + new) // page_size)
        table[row, :used] = pages[row * max_pages : row * max_pages + used]
        positions[token : token + new] = np.arange(old, old + new)
        rows[token : token + new] = row
        kv_lens[row] = old + new
        starts[row] = token
        for start in range(token, token + new, tile_size):
            tile_rows.append(row)
            tile_starts.append(start)
        token += new
    if decode:
        rows = np.arange(num_tokens, dtype=np.int32)
    spare = [0] * 3
    meta = AttentionMetadata(
        positions=jnp.asarray(positions),
        token_rows=jnp.asarray(rows),
        page_table=jnp.asarray(table),
        kv_lens=jnp.asarray(kv_lens),
        query_starts=jnp.asarray(starts),
        tile_rows=jnp.asarray(np.array(tile_rows + spare, np.int32)),
        tile_starts=jnp.asarray(np.array(tile_starts + spare, np.int32)),
        num_tiles=jnp.int32(len(tile_rows)),
        kind="decode" if decode else "mixed",
        tile_size=tile_size,
    )
    return Step(
        q=rng.standard_normal((num_tokens, num_heads, head_dim), np.float32),
        k=rng.standard_normal((num_tokens, num_kv_heads, head_dim), np.float32),
        v=rng.standard_normal((num_tokens, num_kv_heads, head_dim), np.float32),
        kv_pages=rng.standard_normal((num_pages, page_size, num_kv_heads, 2, head_dim), np.float32),
        meta=meta,
        num_live=num_live,
    )


def some_of_everything(cases: Mapping[str, Any], options: Mapping[str, Any]) -> list[Any]:
    """All cases, each with one of the options, and one with all of them: compiling takes its time."""
    return [
        pytest.param(case, chosen, id=f"{case_name}, {options_name}")
        for i, (case_name, case) in enumerate(cases.items())
        for j, (options_name, chosen) in enumerate(options.items())
        if i % len(options) == j or case_name == "decodes and chunks"
    ]
