"""The tower on the device: its weights, its programs, and the buffer of the tokens that images became."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.plan import Encode
from jaxserve.engine.settle import Settings
from jaxserve.engine.tower_batch import pack
from jaxserve.engine.tower_lattice import TowerShape
from jaxserve.engine.tower_programs import TowerBook
from jaxserve.errors import ConfigError


class Tower:
    """Encodes images into `cache`, which forward passes read; both in the order in which they are dispatched."""

    def __init__(
        self,
        settings: Settings,
        weights: tuple[jax.Array, ...],
        programs: dict[str, jax.stages.Compiled],
        book: TowerBook,
    ) -> None:
        """`programs` are those of `book`, compiled, and maybe others."""
        assert settings.tower is not None
        assert settings.model.vision is not None
        self._vision = settings.model.vision
        self._tower = settings.tower
        self._weights = weights
        self._programs = programs
        spec = book.cache_spec
        self.cache = jnp.zeros(
            spec.shape, spec.dtype, device=spec.sharding
        )  # [R + 1, D], the last row a dummy

    def warm_up(self) -> None:
        """Run every program once, on padding.  Raises ConfigError if the device has too little memory for one."""
        for shape in reversed(self._tower.lattice.shapes):
            try:
                self._call(shape, *pack((), shape, self._vision, self._tower.cache_rows))
                jax.block_until_ready(self.cache)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise ConfigError(
                    f"the device's memory does not suffice for images of {shape.num_patches} patches: lower max_pixels "
                    "in mm_processor_kwargs, or gpu_memory_utilization"
                ) from error

    def encode(self, encodes: Sequence[Encode]) -> None:
        """Queue one call for these images, ahead of whatever reads them."""
        sizes = [len(encode.image.pixels) // self._vision.frame_values for encode in encodes]
        shape = self._tower.lattice.shape(sizes)
        assert shape is not None, "the scheduler keeps to the lattice"
        self._call(shape, *pack(encodes, shape, self._vision, self._tower.cache_rows))

    def _call(self, shape: TowerShape, pixels: np.ndarray, vector: np.ndarray) -> None:
        self.cache = self._programs[shape.name](self._weights, self.cache, pixels, vector)
