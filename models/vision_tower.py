"""The vision towers of Qwen2-VL and Qwen2.5-VL: patches of images in, tokens of the language model out."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import VisionConfig
from jaxserve.kernels_pallas.bidirectional import Windows, attend_whole, attend_windows
from jaxserve.kernels_pallas.heads import RopeTable, rotate
from jaxserve.kernels_pallas.matmul import contract
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.models.layers import RMSNorm, parameter
from jaxserve.models.rope_frequencies import plain_frequencies

_EPS = 1e-6  # of every norm; no config says it
_THETA = 10_000.0  # likewise, of rotation by rows and columns


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias over the last axis, computed in float32."""

    def __init__(self, size: int, axis: str, dtype: jnp.dtype) -> None:
        self.scale = parameter((size,), (axis,), dtype)
        self.bias = parameter((size,), (axis,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + _EPS) * self.scale[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
    """x @ weight + bias."""

    def __init__(self, sizes: tuple[int, ...], axes: tuple[str, ...], dtype: jnp.dtype) -> None:
        """`sizes` and `axes` of the weight, whose first axis is contracted."""
        self.weight = parameter(sizes, axes, dtype)
        self.bias = parameter(sizes[1:], axes[1:], dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight, bias = self.weight[...], self.bias[...]
        # As matrix and vector: the sum of a product and a bias of several axes is no one call of cuBLAS.
        flat = contract(x, weight.reshape(weight.shape[0], -1), backend="xla") + bias.reshape(-1)
        return flat.reshape(*x.shape[:-1], *bias.shape)


class PlainMLP(nnx.Module):
    """Qwen2-VL: down(quick_gelu(up(x)))."""

    def __init__(self, config: VisionConfig, dtype: jnp.dtype) -> None:
        embed, ffn = config.hidden_size, config.intermediate_size
        self.up = Linear((embed, ffn), ("vision_embed", "vision_ffn"), dtype)
        self.down = Linear((ffn, embed), ("vision_ffn", "vision_embed"), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        up = self.up(x).astype(jnp.float32)
        return self.down((up * jax.nn.sigmoid(1.702 * up)).astype(x.dtype))


class GatedVisionMLP(nnx.Module):
    """Qwen2.5-VL: down(silu(gate(x)) * up(x)), gate and up being one weight [D, 2, F]."""

    def __init__(self, config: VisionConfig, dtype: jnp.dtype) -> None:
        embed, ffn = config.hidden_size, config.intermediate_size
        self.gate_up = Linear((embed, 2, ffn), ("vision_embed", "vision_gate_up", "vision_ffn"), dtype)
        self.down = Linear((ffn, embed), ("vision_ffn", "vision_embed"), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up = self.gate_up(x).astype(jnp.float32)
        return self.down((jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]).astype(x.dtype))


class VisionLayer(nnx.Module):
    """Attention, then feed-forward, each behind a norm and beside a residual.

    A tower with windows is Qwen2.5-VL's: it has RMS norms and a gated feed-forward, the other layer norms and a plain
    one.
    """

    def __init__(self, config: VisionConfig, dtype: jnp.dtype) -> None:
        embed, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        self.attention_norm = _norm(config, dtype)
        self.qkv = Linear(
            (embed, 3, heads, head_dim),
            ("vision_embed", "vision_qkv", "vision_heads", "vision_head_dim"),
            dtype,
        )
        self.o = Linear((embed, embed), ("vision_attended", "vision_embed"), dtype)
        self.mlp_norm = _norm(config, dtype)
        self.mlp = (PlainMLP if config.window_size is None else GatedVisionMLP)(config, dtype)

    def __call__(
        self, x: jax.Array, rope: RopeTable, lengths: jax.Array, windows: Windows | None, backend: Backend
    ) -> jax.Array:
        """x [B * P, D], of B images with `lengths` [B] patches each; they see all of it if `windows` is None."""
        qkv = self.qkv(self.attention_norm(x))  # [T, 3, N, H]
        q, k, v = rotate(qkv[:, 0], rope), rotate(qkv[:, 1], rope), qkv[:, 2]
        scale = q.shape[-1] ** -0.5
        if windows is None:
            shape = (lengths.shape[0], -1, *q.shape[1:])
            q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
            out = attend_whole(q, k, v, lengths, scale, backend)
        else:
            out = attend_windows(jnp.stack([q, k, v], axis=1), windows, scale)
        x = x + self.o(out.reshape(x.shape))
        return x + self.mlp(self.mlp_norm(x))


@partial(jax.jit, static_argnums=(0, 6))
def _run_layer(
    graphdef: nnx.GraphDef[VisionLayer],
    state: nnx.State,
    x: jax.Array,
    rope: RopeTable,
    lengths: jax.Array,
    windows: Windows | None,
    backend: Backend,
) -> jax.Array:
    """One layer as a function of its own: see decoder._run_layer."""
    return nnx.merge(graphdef, state)(x, rope, lengths, windows, backend)


class VisionTower(nnx.Module):
    """Patch embedding, layers, and the merger that makes one token of merge_size x merge_size patches."""

    def __init__(self, config: VisionConfig, out_size: int, dtype: jnp.dtype) -> None:
        """`out_size` is the language model's hidden size."""
        self.config = config
        merged = config.hidden_size * config.merged_patches
        self.patch_embedding = parameter(
            (config.num_channels, config.temporal_patch_size, config.patch_size**2, config.hidden_size),
            ("vision_channel", "vision_frame", "vision_pixel", "vision_embed"),
            dtype,
        )
        self.layers = nnx.List(VisionLayer(config, dtype) for _ in range(config.num_layers))
        self.merger_norm = _norm(config, dtype)
        self.merger_up = Linear((merged, merged), ("vision_merged", "vision_merger_ffn"), dtype)
        self.merger_down = Linear((merged, out_size), ("vision_merger_ffn", "embed"), dtype)

    def __call__(
        self,
        frames: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        windows: Windows | None,
        backend: Backend,
    ) -> jax.Array:
        """Tokens [B, P / M, D'] of B images, M = merge_size ** 2.

        frames [B, P, C * patch_size ** 2] are normalised patches of one frame each, which stands for all of a patch's
        frames; those that become one token stand side by side.  positions [B, P, 2] int32 are their rows and
        columns, lengths [B] int32 how many there are; `windows` if the tower has any.  What is behind the lengths
        has no meaning.
        """
        config = self.config
        rows, patches, _ = frames.shape
        # All frames of a patch are alike, so that one product with the sum of their weights does.
        embedding = self.patch_embedding[...].astype(jnp.float32).sum(axis=1).astype(frames.dtype)
        x = contract(
            frames.reshape(rows * patches, -1), embedding.reshape(-1, config.hidden_size), backend="xla"
        )
        rope = _rope(positions.reshape(-1, 2), config.head_dim)
        for index, layer in enumerate(self.layers):
            sees_windows = index not in config.full_attention_layers
            x = _run_layer(*nnx.split(layer), x, rope, lengths, windows if sees_windows else None, backend)
        merged = self.merger_norm(x).reshape(-1, config.hidden_size * config.merged_patches)
        hidden = jax.nn.gelu(self.merger_up(merged).astype(jnp.float32), approximate=False)
        tokens = self.merger_down(hidden.astype(x.dtype))
        return tokens.reshape(rows, -1, tokens.shape[-1])


def _norm(config: VisionConfig, dtype: jnp.dtype) -> LayerNorm | RMSNorm:
    if config.window_size is None:
        return LayerNorm(config.hidden_size, "vision_embed", dtype)
    return RMSNorm(config.hidden_size, "vision_embed", _EPS, dtype)


def _rope(positions: jax.Array, head_dim: int) -> RopeTable:
    """One half of a head's pairs turns by the row, the other by the column: positions [T, 2]."""
    frequencies: np.ndarray = plain_frequencies(_THETA, head_dim // 2)  # [H/4]
    angles = (positions.astype(jnp.float32)[:, :, None] * frequencies).reshape(-1, head_dim // 2)
    return RopeTable(jnp.cos(angles), jnp.sin(angles))
