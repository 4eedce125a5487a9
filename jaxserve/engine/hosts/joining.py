"""How the processes of one engine find each other: JAX's runtime, and our own connection for plans beside it."""

from __future__ import annotations

import logging
import socket
import time

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.hosts.link import Link
from jaxserve.engine.hosts.messages import Hello
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

JOIN_SECONDS = 1800  # that hosts wait for each other: they need not start in any order, or at once
_RETRY_SECONDS = 0.5
# JAX ends a process that misses another one's heartbeats.  We notice sooner, and go on answering that it is so.
_JAX_HEARTBEAT_SECONDS = 24 * 3600
_SHUTDOWN_SECONDS = 5  # that a process which ends waits for the others to do so


def join_hosts(config: EngineConfig) -> None:
    """Make the devices of all hosts known to this process.  Before anything else of JAX."""
    if config.nnodes == 1 or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    logger.info("waiting for %d hosts at %s:%d", config.nnodes, config.master_addr, config.master_port)
    try:
        jax.distributed.initialize(
            f"{config.master_addr}:{config.master_port}",
            config.nnodes,
            config.node_rank,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=_JAX_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise ConfigError(
            f"master_addr={config.master_addr!r}, master_port={config.master_port}: the hosts did not find each other: "
            f"{error}"
        ) from error


def plan_port(config: EngineConfig) -> int:
    """The port on which the first host tells its plans: the one behind JAX's."""
    return config.master_port + 1


def listen_for_followers(config: EngineConfig) -> socket.socket:
    """The first host's socket.  Raises ConfigError if its port is taken."""
    port = plan_port(config)
    try:
        return socket.create_server(("", port), backlog=config.nnodes)
    except OSError as error:
        raise ConfigError(
            f"master_port={config.master_port}: the port behind it, {port}, cannot be had: {error.strerror}"
        ) from error


def connect_to_leader(config: EngineConfig, hello: Hello) -> Link:
    """A follower's connection to the first host.  Raises ConfigError if there is none within JOIN_SECONDS."""
    assert config.master_addr is not None
    address = config.master_addr, plan_port(config)
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            link = Link(socket.create_connection(address, timeout=_RETRY_SECONDS))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"node_rank 0 does not answer at {address[0]}:{address[1]}: {error}"
                ) from error
            time.sleep(_RETRY_SECONDS)
        else:
            link.send(hello)
            return link
