"""The tower's programs: images in, their tokens into the encoder's cache."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import ImageProcessorConfig
from jaxserve.engine.programs import Program
from jaxserve.engine.settle import Settings
from jaxserve.engine.tower_batch import unpack, vector_length
from jaxserve.engine.tower_lattice import TowerShape
from jaxserve.engine.weight_pack import WeightPack
from jaxserve.kernels_pallas.attention import backend_of
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.models.vision_tower import VisionTower


class TowerBook:
    """All programs of one engine's tower, from its settings and the tower's graph definition and abstract weights."""

    def __init__(
        self,
        settings: Settings,
        graphdef: nnx.GraphDef[VisionTower],
        abstract_state: nnx.State,
        cache_spec: jax.ShapeDtypeStruct,
    ) -> None:
        """`cache_spec` is of the tokens that images become, as forward passes take them."""
        assert settings.tower is not None
        assert settings.model.vision is not None
        self._settings = settings
        self._tower = settings.tower
        self._vision = settings.model.vision
        self._graphdef = graphdef
        leaves, self._treedef = jax.tree.flatten(abstract_state)
        self._pack = WeightPack.plan(leaves)
        self._backend: Backend = backend_of(settings.platform, self._vision.head_dim)
        self.cache_spec = cache_spec

    def __iter__(self) -> Iterator[Program]:
        for shape in reversed(self._tower.lattice.shapes):
            yield Program(shape.name, lambda shape=shape: self._lower(shape), shape.total)

    def pack(self, state: nnx.State) -> tuple[jax.Array, ...]:
        """The tower's parameters as the programs take them."""
        return self._pack.pack(jax.tree.leaves(state))

    def _lower(self, shape: TowerShape) -> jax.stages.Lowered:
        merged = self._vision.merged_patches

        def encode(weights, cache, pixels, vector):
            leaves = self._pack.unpack(weights)
            tower = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))
            batch = unpack(vector, shape, merged)
            frames = normalised(pixels, self._tower.processor).astype(cache.dtype)
            tokens = tower(frames, batch.positions, batch.lengths, batch.windows, self._backend)
            return cache.at[batch.destinations.reshape(-1)].set(tokens.reshape(-1, tokens.shape[-1]))

        pixels = (shape.num_images, shape.num_patches, self._vision.frame_values)
        # Of several devices each has all of the images, and a share of heads and feed-forwards.
        sharding = self.cache_spec.sharding
        return jax.jit(encode, donate_argnums=1, out_shardings=sharding).lower(
            self._pack.specs,
            self.cache_spec,
            jax.ShapeDtypeStruct(pixels, jnp.uint8, sharding=sharding),
            jax.ShapeDtypeStruct((vector_length(shape, merged),), jnp.int32, sharding=sharding),
        )


def normalised(pixels: jax.Array, processor: ImageProcessorConfig) -> jax.Array:
    """Patches [..., C * pixels] of bytes as float32, each channel with its mean and deviation."""
    mean, std = (
        np.asarray(values, np.float32)[:, None] for values in (processor.image_mean, processor.image_std)
    )
    channels = pixels.reshape(*pixels.shape[:-1], len(mean), -1).astype(jnp.float32)
    return ((channels * np.float32(processor.rescale_factor) - mean) / std).reshape(pixels.shape)
