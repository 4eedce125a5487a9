"""A whole model that sees, run over one sequence: tower and language model by direct calls, in one step each."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.engine.image_batch import token_places
from jaxserve.engine.image_planner import num_patches
from jaxserve.engine.image_positions import ImagePositions, token_grid
from jaxserve.engine.plan import Encode, ImageSpan, PlanEntry
from jaxserve.engine.tower_batch import pack, unpack
from jaxserve.engine.tower_lattice import TowerShape
from jaxserve.engine.tower_programs import normalised
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.models.image_tokens import ImageTokens
from jaxserve.models.qwen2_vl import Qwen2VL
from tests.models.golden import PAGE_SIZE
from tests.models.vision_cases import PROCESSOR, Turn
from tests.quick_compile import QUICK

_LENGTH = 256  # tokens that every sequence is padded to


class SeeingModel:
    """Logits of conversations, by what the engine's programs are made of but without an engine."""

    def __init__(self, model: Qwen2VL) -> None:
        graphdef, state = nnx.split(model)
        vision = model.config.vision
        assert vision is not None
        self._config, self._vision = model.config, vision
        self._embeddings: dict[str, np.ndarray] = {}
        self._meta = _metadata(_LENGTH)
        block = 0 if vision.window_size is None else vision.window_size**2
        self._shape = TowerShape(1, 256, 2 * -(-256 // block) if block else 0, block)

        @partial(jax.jit, compiler_options=QUICK)
        def encode(state: Any, pixels: jax.Array, vector: jax.Array) -> jax.Array:
            batch = unpack(vector, self._shape, vision.merged_patches)
            frames = normalised(pixels, PROCESSOR)
            tower = nnx.merge(graphdef, state).visual
            return tower(frames, batch.positions, batch.lengths, batch.windows, "xla")[0]

        @partial(jax.jit, compiler_options=QUICK)
        def run(state: Any, token_ids: jax.Array, meta: AttentionMetadata, images: ImageTokens) -> jax.Array:
            model, config = nnx.merge(graphdef, state), self._config
            page = (_LENGTH // PAGE_SIZE + 1, PAGE_SIZE, config.num_kv_heads, 2, config.head_dim)
            pages = tuple(jnp.zeros(page) for _ in range(config.num_layers))
            return model.logits(model(token_ids, pages, meta, None, images)[0])

        self._encode = lambda pixels, vector: np.asarray(encode(state, pixels, vector))
        self._run = lambda token_ids, images: np.asarray(run(state, token_ids, self._meta, images))

    def tokens(self, turn: Turn, index: int) -> np.ndarray:
        """What the tower makes of an image, [tokens, D]."""
        image = turn.images[index]
        assert num_patches(image) <= self._shape.num_patches
        if image.content_hash not in self._embeddings:
            encode = Encode(image=image, pages=tuple(range(100)))
            tokens = self._encode(*pack([encode], self._shape, self._vision, -1))
            self._embeddings[image.content_hash] = tokens[: image.num_tokens]
        return self._embeddings[image.content_hash]

    def logits(self, turn: Turn) -> np.ndarray:
        """Logits [T, V] of the turn's tokens."""
        length = len(turn.token_ids)
        embeddings = np.zeros((_LENGTH, self._config.hidden_size), np.float32)
        positions, rows = np.zeros((3, _LENGTH), np.int32), np.full(_LENGTH, -1, np.int32)
        spans, page = [], 0
        for index, (image, rope_start) in enumerate(ImagePositions(turn.images).within(0, length)):
            down, across = token_grid(image)
            pages = tuple(range(page, page - (-image.num_tokens // 32)))
            embeddings[page * 32 : page * 32 + image.num_tokens] = self.tokens(turn, index)
            page += len(pages)
            spans.append(
                ImageSpan(
                    start=image.offset, num_rows=down, num_columns=across, rope_start=rope_start, pages=pages
                )
            )
        entry = PlanEntry(
            seq_id=0,
            slot=0,
            start=0,
            token_ids=tuple(turn.token_ids),
            samples=False,
            num_generated=0,
            page_offset=0,
            new_pages=(),
            images=tuple(spans),
        )
        positions[:, :length], rows[:length] = token_places(entry)
        token_ids = np.zeros(_LENGTH, np.int32)
        token_ids[:length] = turn.token_ids
        return self._run(token_ids, ImageTokens(positions, rows, embeddings))[:length]  # type: ignore[arg-type]  # numpy


def _metadata(length: int) -> AttentionMetadata:
    return AttentionMetadata(
        positions=jnp.arange(length),
        token_rows=jnp.zeros(length, jnp.int32),
        page_table=jnp.arange(1, 1 + length // PAGE_SIZE)[None],
        kv_lens=jnp.asarray([length]),
        query_starts=jnp.asarray([0, length]),
        tile_rows=jnp.zeros(1, jnp.int32),
        tile_starts=jnp.zeros(1, jnp.int32),
        num_tiles=jnp.int32(1),
        kind="mixed",
        tile_size=length,
    )
