"""The engines that a configuration asks for, each on devices of its own, behind one EngineClient."""

from __future__ import annotations

from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.balanced_client import BalancedClient
from jaxserve.engine.client import build_client
from jaxserve.engine.devices import find_devices, missing_devices
from jaxserve.engine.protocol import EngineClient
from jaxserve.engine.shared_weights import SharedWeights
from jaxserve.errors import ConfigError
from jaxserve.loading.checkpoint import AnyCheckpoint
from jaxserve.models.sharding import split_devices
from jaxserve.structured.compiler import GrammarCompiler


def build_replicas(
    config: EngineConfig,
    checkpoint: AnyCheckpoint | None,
    model: ModelConfig,
    grammars: GrammarCompiler | None = None,
    processor: ImageProcessorConfig | None = None,
) -> EngineClient:
    """One engine, or `data_parallel_size` of them on consecutive devices, not started; see build_client.

    The checkpoint is read once: replicas after the first one copy its weights from device to device.  Programs are
    compiled for each replica, since they belong to its devices.
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
    weights = SharedWeights(count)
    clients = [
        build_client(config, checkpoint, model, grammars, processor, devices=own, weights=weights)
        for own in split_devices(devices[:wanted], count)
    ]
    return BalancedClient(clients, enable_prefix_caching=config.enable_prefix_caching)
