"""One engine's time over several hosts, from the first meeting to the end, on either side."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import replace
from typing import NoReturn

import jax

from jaxserve import __version__
from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.building import build_runner, settle_engine
from jaxserve.engine.hosts.follower import Follower
from jaxserve.engine.hosts.joining import connect_to_leader, listen_for_followers
from jaxserve.engine.hosts.leader import Followers
from jaxserve.engine.hosts.link import LinkLostError
from jaxserve.engine.hosts.messages import End, Hello
from jaxserve.engine.hosts.runtime import JOIN_SECONDS
from jaxserve.engine.settle import Settings
from jaxserve.errors import JaxserveError
from jaxserve.loading.checkpoint import AnyCheckpoint

logger = logging.getLogger(__name__)


def meet_followers(config: EngineConfig, settings: Settings) -> tuple[Followers, Settings]:
    """On the first host: wait for the others, and agree with them.

    Until somebody else watches the followers, losing one ends this process: it may wait for them in a program.
    """
    followers = Followers(listen_for_followers(config), config.nnodes - 1, _fingerprint(config, settings))
    try:
        agreed = followers.wait(JOIN_SECONDS, settings.memory.num_pages)
    except BaseException as error:
        followers.end(str(error) or type(error).__name__)
        raise
    followers.watch(end_process)
    return followers, _with_pages(settings, agreed)


def follow(
    config: EngineConfig,
    checkpoint: AnyCheckpoint | None,
    model: ModelConfig,
    processor: ImageProcessorConfig | None,
) -> None:
    """On the other hosts: build the same runner, and do what the first host plans until it ends.

    Raises ConfigError and CheckpointError as build_client does, on this host and on the first one.
    """
    settings, devices = settle_engine(config, model, processor)
    hello = Hello(config.node_rank, _fingerprint(config, settings), settings.memory.num_pages)
    link = connect_to_leader(config, hello)
    follower = Follower(link, end_process)
    try:
        settings = _with_pages(settings, follower.wait())
        runner = build_runner(config, checkpoint, settings, devices)
        logger.info("node_rank %d is ready", config.node_rank)
        follower.run(runner)
    except BaseException as error:
        try:
            link.send(End(f"{type(error).__name__}: {error}"))
        except LinkLostError:
            pass  # then that is why
        raise


def end_process(error: BaseException) -> NoReturn:
    """Here and now, with status 1.

    For hosts that cannot do anything alone: their threads may be in a program that waits for the lost one.
    """
    unexpected = None if isinstance(error, JaxserveError | KeyboardInterrupt) else error
    logger.critical("%s; this process ends", str(error) or type(error).__name__, exc_info=unexpected)
    logging.shutdown()
    os._exit(1)


def _with_pages(settings: Settings, num_pages: int) -> Settings:
    return replace(settings, memory=replace(settings.memory, num_pages=num_pages))


def _fingerprint(config: EngineConfig, settings: Settings) -> str:
    """Of everything that makes programs, weights and plans what they are; memory is agreed upon apart."""
    parts = (
        __version__,
        jax.__version__,
        config.load_format,
        config.seed,
        replace(settings, memory=replace(settings.memory, available=0, num_pages=0)),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
