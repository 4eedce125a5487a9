"""Which tokens of a step belong to which sequence, and where their keys and values live."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax

StepKind = Literal["decode", "mixed"]
Backend = Literal["xla", "cpu", "gpu", "tpu"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "positions",
        "token_rows",
        "page_table",
        "kv_lens",
        "query_starts",
        "tile_rows",
        "tile_starts",
        "num_tiles",
    ],
    meta_fields=["kind", "tile_size", "backend"],
)
@dataclass(frozen=True)
class AttentionMetadata:
    """Host-planned layout of one step.  R rows (sequences), T tokens, MP pages a row at most.

    `kind="decode"`: T == R, token i is row i's only new token.  `kind="mixed"`: row r's new tokens are
    query_starts[r] : query_starts[r + 1]; they are cut into tiles of at most `tile_size` tokens of one row.
    Padding tokens point at a row whose kv_len is 0 and whose pages are all page 0, the dummy page.
    """

    positions: jax.Array  # [T] int32, position of each token in its sequence
    token_rows: jax.Array  # [T] int32, its row of page_table
    page_table: jax.Array  # [R, MP] int32
    kv_lens: jax.Array  # [R] int32, tokens in the cache once this step's are written
    query_starts: jax.Array  # [R + 1] int32
    tile_rows: jax.Array  # [NT] int32, row of each query tile
    tile_starts: jax.Array  # [NT] int32, first token of the tile, counted within the step
    num_tiles: jax.Array  # [] int32, tiles in use
    kind: StepKind
    tile_size: int
    backend: Backend = "xla"  # whose kernels, see attention.backend_of

    @property
    def is_live(self) -> jax.Array:
        """[T] bool, whether each token belongs to a sequence; the others are padding."""
        return self.kv_lens[self.token_rows] > 0
