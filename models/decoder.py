"""The decoder-only language model that every family here is a case of."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.config import ExpertsConfig, ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.attention import StepScratch, start_step
from jaxserve.kernels_pallas.heads import RopeTable
from jaxserve.kernels_pallas.matmul import contract, contract_rows
from jaxserve.kernels_pallas.metadata import AttentionMetadata, Backend
from jaxserve.models.experts import ExpertsMLP
from jaxserve.models.image_tokens import ImageTokens
from jaxserve.models.layers import Attention, GatedMLP, RMSNorm, parameter, take_rows
from jaxserve.models.part import WHOLE, Part
from jaxserve.models.rope import rope_table


class DecoderLayer(nnx.Module):
    """Attention, then feed-forward, each behind a norm and beside a residual."""

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        experts: ExpertsConfig | None,
        dtype: jnp.dtype,
        part: Part = WHOLE,
    ) -> None:
        self.part = part
        self.attention_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype)
        self.attention = Attention(config, window, dtype, part)
        self.mlp_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype)
        self.mlp = (
            GatedMLP(config, dtype, part)
            if experts is None
            else ExpertsMLP(config.hidden_size, experts, dtype, part)
        )

    def __call__(
        self,
        x: jax.Array,
        delta: jax.Array | None,
        kv_pages: jax.Array,
        rope: RopeTable,
        meta: AttentionMetadata,
        scratch: StepScratch,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, StepScratch]:
        """x [T, D] and what the layer before adds to it, [C, T, D], to the same of this layer, and the pages.

        If `rows` [R] are given, x and what is added to it are those tokens', [R, D] and [C, R, D].  In steps that
        scatter (Part.scatters), x and what is added to it are this device's share of the T rows; `rows` are whole.
        """
        backend, part = meta.backend, self.part
        scatter = part.scatters(meta.positions.shape[0])
        x, normed = self.attention_norm.add(x, delta, backend)
        if scatter:
            normed = part.all_rows(normed)
        is_live = meta.is_live
        if rows is not None:
            x = part.take_rows(x, rows) if scatter else take_rows(x, rows)
            is_live, scatter = take_rows(is_live, rows), False
        attended, kv_pages, scratch = self.attention(
            normed, kv_pages, rope, meta, scratch, rows, scatter=scatter
        )
        x, normed = self.mlp_norm.add(x, attended, backend)
        if scatter:
            normed = part.all_rows(normed)
        if isinstance(self.mlp, GatedMLP):
            return x, self.mlp(normed, backend, scatter=scatter), kv_pages, scratch
        return x, self.mlp(normed, is_live, backend, scatter=scatter), kv_pages, scratch


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graphdef: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: jax.Array,
    delta: jax.Array | None,
    kv_pages: jax.Array,
    rope: RopeTable,
    meta: AttentionMetadata,
    scratch: StepScratch,
    rows: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, StepScratch]:
    """One layer as a function of its own: layers alike are traced and lowered once, and XLA inlines the calls.

    Of 32 layers with GPU kernels that takes an eighth of the time (jax 0.10.2, 2026-11-23), all of it under the
    interpreter lock, which programs that compile side by side share.
    """
    return nnx.merge(graphdef, state)(x, delta, kv_pages, rope, meta, scratch, rows)


class DecoderModel(nnx.Module):
    """Embedding, layers, final norm and output head.  A family is a subclass that says what it fixes.

    Of a model over several devices this is one device's part, with the sizes that it has there (layout.Layout.local).
    """

    fixed: ClassVar[dict[str, Any]] = {}  # ModelConfig fields with one possible value in this family
    may_slide: ClassVar[bool] = False  # whether layers may have a sliding window
    has_experts: ClassVar[bool] = False  # whether layers have experts

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, part: Part = WHOLE) -> None:
        """Raises ConfigError where the config asks for what the family does not have."""
        for name, value in self.fixed.items():
            if getattr(config, name) != value:
                raise ConfigError(
                    f"model config: {name} is {getattr(config, name)!r}; "
                    f"in family {config.family!r} it is {value!r}"
                )
        if not self.may_slide and any(window is not None for window in config.layer_windows):
            raise ConfigError(
                f"model config: layer_windows is {config.layer_windows}; "
                f"family {config.family!r} has no windows"
            )
        if self.has_experts != (config.experts is not None):
            raise ConfigError(
                f"model config: experts is {config.experts}; "
                f"family {config.family!r} {'cannot do without' if self.has_experts else 'has none'}"
            )
        self.config = config
        self.part = part
        self.embedding = parameter((config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype)
        # Unrolled: scanning over stacked layers makes XLA copy every weight slice, at twice a step's time.
        self.layers = nnx.List(
            DecoderLayer(config, window, config.experts_of(layer), dtype, part)
            for layer, window in enumerate(config.layer_windows)
        )
        self.norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype)
        tied = config.tie_word_embeddings
        head_shape = (config.hidden_size, config.vocab_size)
        self.lm_head = None if tied else parameter(head_shape, ("embed", "vocab"), dtype)

    def __call__(
        self,
        token_ids: jax.Array,
        kv_pages: tuple[jax.Array, ...],
        meta: AttentionMetadata,
        rows: jax.Array | None = None,
        images: ImageTokens | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """One step: token_ids [T] int32, each layer's pages [P, S, K, 2, H] to hidden [T, D] and the pages.

        `rows` [R] int32 are the tokens whose hidden states are wanted, [R, D]: what the last layer does behind its
        attention it does for them alone.  `hidden` has passed the final norm; give the rows that need logits to
        `logits`.  `images` of models that see.
        """
        last = len(self.layers) - 1
        # More rows than tokens are mostly padding, and cheaper to take at the end.
        cut = None if rows is None or rows.shape[0] >= token_ids.shape[0] else rows
        x = self.part.take_rows(self.embedding[...], token_ids)  # ids are checked at the door
        rope = rope_table(meta.positions, self.config)
        if images is not None:
            x, rope = images.splice(x), images.rope_table(self.config)
        scatters = self.part.scatters(token_ids.shape[0])
        if scatters:
            x = self.part.own_rows(x)
        scratch = start_step(meta, self.config.num_kv_heads)
        delta, written = None, []
        for index, (layer, pages) in enumerate(zip(self.layers, kv_pages, strict=True)):
            wanted = cut if index == last else None
            x, delta, pages, scratch = _run_layer(
                *nnx.split(layer), x, delta, pages, rope, meta, scratch, wanted
            )
            written.append(pages)
        _, hidden = self.norm.add(x, delta, meta.backend)
        if scatters and cut is None:
            hidden = self.part.all_rows(hidden)
        return (take_rows(hidden, rows) if rows is not None and cut is None else hidden), tuple(written)

    def logits(self, hidden: jax.Array, backend: Backend = "xla") -> jax.Array:
        """hidden [R, D] to [R, V] float32: accumulated and kept wide, since sampling compares near ties.

        Of a part: to the logits of its share of the vocabulary, what pads it included.
        """
        wide = jnp.dtype(jnp.float32)
        if self.lm_head is not None:
            return contract(hidden, self.lm_head[...], backend=backend, out_dtype=wide)
        # Contracting the embedding's own last axis spares a transposed copy of the largest weight there is.
        return contract_rows(hidden, self.embedding[...], backend=backend, out_dtype=wide)
