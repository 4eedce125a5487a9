"""The engines that a configuration asks for, each on devices of its own, behind one EngineClient."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory

from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.balanced_client import BalancedClient
from jaxserve.engine.building import settle_engine
from jaxserve.engine.client import InProcessClient, build_client, build_settled
from jaxserve.engine.devices import find_devices, missing_devices
from jaxserve.engine.protocol import EngineClient
from jaxserve.engine.settle import with_pages
from jaxserve.engine.shared_weights import SharedWeights
from jaxserve.errors import ConfigError
from jaxserve.loading.checkpoint import AnyCheckpoint
from jaxserve.models.sharding import split_devices
from jaxserve.structured.compiler import GrammarCompiler

logger = logging.getLogger(__name__)


def build_replicas(
    config: EngineConfig,
    checkpoint: AnyCheckpoint | None,
    model: ModelConfig,
    grammars: GrammarCompiler | None = None,
    processor: ImageProcessorConfig | None = None,
) -> EngineClient:
    """One engine, or `data_parallel_size` of them on consecutive devices, not started; see build_client.

    The checkpoint is read once: replicas after the first one copy its weights from device to device.  Programs are
    compiled once: the others find them in the cache.
    """
    if config.nnodes > 1:
        # Not above: what processes tell each other brings packages that one host does without.
        from jaxserve.engine.hosts.leading_client import build_leading_client

        return build_leading_client(config, checkpoint, model, grammars, processor)
    count = config.data_parallel_size
    if count == 1:
        return build_client(config, checkpoint, model, grammars, processor)
    devices, wanted = find_devices(config), count * config.tensor_parallel_size
    if len(devices) < wanted:
        raise ConfigError(
            f"data_parallel_size={count} of tensor_parallel_size={config.tensor_parallel_size} "
            f"need {wanted} devices: {missing_devices(devices, wanted)}"
        )
    settled = [settle_engine(config, model, processor, own) for own in split_devices(devices[:wanted], count)]
    num_pages = min(settings.memory.num_pages for settings, _ in settled)
    weights = SharedWeights(count)
    clients: list[InProcessClient] = []
    with _caching(config) as config:
        for number, (settings, own) in enumerate(settled, start=1):
            logger.info("engine %d of %d, on %s", number, count, ", ".join(map(str, own)))
            settings = with_pages(settings, num_pages)
            clients.append(build_settled(config, checkpoint, settings, own, grammars, weights))
    return BalancedClient(clients, enable_prefix_caching=config.enable_prefix_caching)


@contextmanager
def _caching(config: EngineConfig) -> Iterator[EngineConfig]:
    """The same, with a cache for the time being where it has none."""
    if config.compile_cache_dir != "":
        yield config
        return
    with TemporaryDirectory(prefix="jaxserve-") as folder:
        yield replace(config, compile_cache_dir=folder)
