"""The programs of an engine that believes it has an accelerator, on a machine that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine import spread
from jaxserve.engine.building import weights_bytes
from jaxserve.engine.programs import ProgramBook
from jaxserve.engine.settle import Settings, settle
from jaxserve.models.on_devices import abstract_on_mesh
from jaxserve.models.parameters import abstract_model

KINDS = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v6 lite"}


@contextmanager
def pretend_device(platform: str, memory: int) -> Iterator[None]:
    """jax.devices gives one H100 or TPU of `memory` bytes."""
    device = SimpleNamespace(
        platform=platform,
        device_kind=KINDS[platform],
        compute_capability="9.0",
        memory_stats=lambda: {"bytes_limit": memory},
    )
    with mock.patch.object(jax, "devices", return_value=[device]):
        yield


@contextmanager
def pretend_book(
    config: EngineConfig,
    model: ModelConfig,
    lower: Callable[..., jax.stages.Lowered],
    *,
    memory: int,
    platform: str = "gpu",
    mesh: Mesh | AbstractMesh | None = None,
) -> Iterator[tuple[Settings, ProgramBook]]:
    """What ProgramBook gives on an H100 or a TPU of `memory` bytes, or on a mesh of those.

    `lower` stands for `jitted.lower`: it gets what jax.jit returned, and the arguments.
    """

    class Jitted:
        def __init__(self, function: Any, **options: Any) -> None:
            self._jitted = jax.jit(function, **options)

        def lower(self, *specs: Any) -> jax.stages.Lowered:
            return lower(self._jitted, *specs)

    class OtherJax:
        """jax, but for jit."""

        jit = Jitted

        def __getattr__(self, name: str) -> Any:
            return getattr(jax, name)

    with pretend_device(platform, memory):
        settings = settle(config, model, weights_bytes(model))
        dtype = jnp.dtype(settings.dtype)
        parts = (
            abstract_model(model, dtype) if mesh is None else abstract_on_mesh(settings.layout, dtype, mesh)
        )
        book = ProgramBook(settings, *parts)
        with mock.patch.object(spread, "jax", OtherJax()):
            yield settings, book
