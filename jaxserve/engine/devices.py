"""Which devices an engine may use, and how much of their memory JAX sets aside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.hosts.runtime import join_hosts
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


# With fewer threads than programs that wait for each other on them, pretend devices may never go on.
_PRETEND = "XLA_FLAGS=--xla_force_host_platform_device_count={count} NPROC={threads}"

# What JAX's allocator may take of an accelerator: the second name is the older one, both at once are an error.
_POOL_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_POOL_SHARE_DEFAULT = 0.75  # JAX's own
_POOL_SHARE_LEAST = (
    0.9  # where kv_cache_memory decides, and the share of the device is not to stand in its way
)
# Of an engine over several accelerators: what all-reduces exchange XLA takes straight from the device, for each of
# every program apart.  The 15 forward passes of Llama 8B left nothing of the tenth beside the usual pool (2 x H100,
# jax 0.11.2, 2026-11-25).
_POOL_SHARE_OF_SEVERAL = 0.9  # of the share otherwise

# NCCL by itself registers the buffers of all-reduces in a CUDA graph, the larger ones, and XLA records its graphs anew
# with each call: soon a device reads what is no longer registered, and the process dies of an illegal address.  Seen
# with all-reduces of 4 MB in graphs over two GPUs, not without registration (2 x H200, jax 0.11.2, 2026-11-26).
_GRAPH_REGISTER = "NCCL_GRAPH_REGISTER"


def find_devices(config: EngineConfig) -> list[Device]:
    """All devices there are.  To be asked first of all: it decides what JAX's allocator takes of them."""
    os.environ.setdefault(_GRAPH_REGISTER, "0")
    _reserve_device_memory(config)
    join_hosts(config)
    return jax.devices()


def engine_devices(config: EngineConfig, devices: Sequence[Device] | None = None) -> tuple[Device, ...]:
    """The devices of one engine: `devices`, or the first ones there are.

    Raises ConfigError if there are too few.
    """
    wanted = config.tensor_parallel_size
    if devices is not None:
        assert len(devices) == wanted, f"{len(devices)} devices for an engine of {wanted}"
        return tuple(devices)
    found = find_devices(config)
    if len(found) < wanted:
        raise ConfigError(f"tensor_parallel_size={wanted}: {missing_devices(found, wanted)}")
    if config.nnodes == 1:
        return tuple(found[:wanted])
    share = wanted // config.nnodes
    hosts = [[device for device in found if device.process_index == rank] for rank in range(config.nnodes)]
    for rank, own in enumerate(hosts):
        if len(own) < share:
            raise ConfigError(
                f"tensor_parallel_size={wanted} over nnodes={config.nnodes}: node_rank {rank} has {len(own)} devices, "
                f"and needs {share}"
            )
    return tuple(device for own in hosts for device in own[:share])


def missing_devices(found: Sequence[Device], wanted: int) -> str:
    """What to say where there are fewer than `wanted` devices."""
    there_are = f"there {'is' if len(found) == 1 else 'are'} {len(found)} ({found[0].device_kind})"
    if found[0].platform == "cpu":
        pretend = _PRETEND.format(count=wanted, threads=2 * wanted)
        return f"{there_are}; for {wanted} pretend ones, to try it out, set {pretend}"
    return f"{there_are}; lower it to at most {len(found)}"


def pool_share() -> float:
    """The share of an accelerator's memory that JAX's allocator has taken."""
    share = next((float(text) for name in _POOL_SHARES if (text := os.environ.get(name))), None)
    return share or _POOL_SHARE_DEFAULT


def _reserve_device_memory(config: EngineConfig) -> None:
    """Let JAX's allocator have the configured share of an accelerator.

    By default it takes three quarters, of which the configured share would then be taken once more.  Whoever set
    the share in the environment, or has used JAX in this process before, has decided already.
    """
    from jax._src import xla_bridge  # nothing public tells whether a backend runs

    if xla_bridge.backends_are_initialized() or any(os.environ.get(name) for name in _POOL_SHARES):
        return
    share = config.gpu_memory_utilization
    if config.kv_cache_memory is not None:
        share = max(share, _POOL_SHARE_LEAST)
    if config.tensor_parallel_size > 1:
        share *= _POOL_SHARE_OF_SEVERAL
    os.environ[_POOL_SHARES[0]] = str(share)
