"""How the processes of one engine come to know each other's devices: JAX's own runtime."""

from __future__ import annotations

import logging

import jax

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

_JOIN_SECONDS = 120  # for the runtimes of hosts that have met already
# JAX ends a process that misses another one's heartbeats.  We notice sooner, and go on answering that it is so.
_JAX_HEARTBEAT_SECONDS = 24 * 3600
_SHUTDOWN_SECONDS = 5  # that a process which ends waits for the others to do so


def join_hosts(config: EngineConfig) -> None:
    """Make the devices of all hosts known to this process.  Before anything else of JAX.

    The hosts have met before (session.py): JAX ends a process that waits in vain, and cannot be interrupted meanwhile.
    """
    if config.nnodes == 1 or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would catch SIGTERM, and do nothing about it.
    jax.config.update("jax_enable_preemption_service", False)
    host = f"[{config.master_addr}]" if ":" in str(config.master_addr) else config.master_addr
    logger.info("joining %d hosts at %s:%d", config.nnodes, host, config.master_port)
    try:
        jax.distributed.initialize(
            f"{host}:{config.master_port}",
            config.nnodes,
            config.node_rank,
            cluster_detection_method="deactivate",
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_JAX_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise ConfigError(
            f"master_addr={config.master_addr!r}, master_port={config.master_port}: the hosts did not find each other: "
            f"{error}"
        ) from error
