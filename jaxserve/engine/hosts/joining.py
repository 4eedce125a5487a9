"""The connection on which the first host tells the others its plans: who listens, and who calls."""

from __future__ import annotations

import logging
import socket
import time

from jaxserve.config import EngineConfig
from jaxserve.engine.hosts.link import Link, LinkLostError
from jaxserve.engine.hosts.messages import Hello
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

JOIN_SECONDS = 1800.0  # that hosts wait for each other: they need not start in any order, or at once
REMINDER_SECONDS = 30.0  # after which one that waits says once more for whom
_RETRY_SECONDS = 0.5


def plan_port(config: EngineConfig) -> int:
    """The port on which the first host tells its plans: the one behind JAX's."""
    return config.master_port + 1


def listen_for_followers(config: EngineConfig) -> socket.socket:
    """The first host's socket.  Raises ConfigError if its port is taken."""
    port = plan_port(config)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=config.nnodes)
    except OSError as error:
        raise ConfigError(
            f"master_port={config.master_port}: the port behind it, {port}, cannot be had: {error.strerror}"
        ) from error


def connect_to_leader(config: EngineConfig) -> Link:
    """A follower's connection to the first host.  Raises ConfigError if there is none within JOIN_SECONDS."""
    assert config.master_addr is not None
    address = config.master_addr, plan_port(config)
    logger.info("looking for node_rank 0 at %s:%d", *address)
    deadline, reminder = time.monotonic() + JOIN_SECONDS, time.monotonic() + REMINDER_SECONDS
    while True:
        try:
            return _greet(address, Hello(config.node_rank, config.nnodes))
        except (OSError, LinkLostError) as error:
            why = f"node_rank 0 does not answer at {address[0]}:{address[1]}: {error}"
            if time.monotonic() > deadline:
                raise ConfigError(why) from error
            if time.monotonic() > reminder:
                logger.info("%s; still trying", why)
                reminder += REMINDER_SECONDS
            time.sleep(_RETRY_SECONDS)


def _greet(address: tuple[str, int], hello: Hello) -> Link:
    """A connection on which `hello` was said.  Raises OSError and LinkLostError."""
    link = Link(socket.create_connection(address, timeout=_RETRY_SECONDS))
    try:
        link.send(hello)
    except LinkLostError:
        link.close()
        raise
    return link
