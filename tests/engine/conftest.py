"""One tiny engine for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.engine import compile_cache
from jaxserve.engine.client import InProcessClient
from tests.engine.tiny_engine import Collector, DenseModel, build_tiny
from tests.quick_compile import QUICK


@pytest.fixture(scope="package", autouse=True)
def quick_compile() -> Iterator[None]:
    """Engines of this folder for CPUs compile quickly; those of tests/real_models do as they do when they serve."""
    honest = compile_cache.compiler_options

    def options(platform: str, *numbers: int) -> dict[str, bool | str]:
        return honest(platform, *numbers) | (QUICK if platform == "cpu" else {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_cache, "compiler_options", options)
        yield


@pytest.fixture(scope="package")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compiled programs that engines of this folder share."""
    return str(tmp_path_factory.mktemp("xla"))


@pytest.fixture(scope="package")
def dense() -> DenseModel:
    return DenseModel(seed=3)


@pytest.fixture(scope="package")
def shared_engine(cache_dir: str) -> Iterator[tuple[InProcessClient, Collector]]:
    client, collector = build_tiny(cache_dir), Collector()
    client.start(collector.on_outputs, collector.on_dead)
    yield client, collector
    client.shutdown()


@pytest.fixture
def engine(shared_engine: tuple[InProcessClient, Collector]) -> tuple[InProcessClient, Collector]:
    """The running tiny engine, idle and with an empty prefix cache."""
    client, collector = shared_engine
    assert client.reset_prefix_cache()
    collector.outputs.clear()
    return client, collector


@pytest.fixture(scope="package")
def cache_path(cache_dir: str) -> Path:
    return Path(cache_dir)
