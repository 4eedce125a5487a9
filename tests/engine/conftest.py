"""One tiny engine for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.engine.client import InProcessClient
from tests.engine.tiny_engine import Collector, DenseModel, build_tiny


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compiled programs that engines of this session share."""
    return str(tmp_path_factory.mktemp("xla"))


@pytest.fixture(scope="session")
def dense() -> DenseModel:
    return DenseModel(seed=3)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def cache_path(cache_dir: str) -> Path:
    return Path(cache_dir)
