"""One engine's time over several hosts, from the first meeting to the end, on either side."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from types import FrameType
from typing import NoReturn

import jax

from jaxserve import __version__
from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.building import build_runner, settle_engine
from jaxserve.engine.hosts.follower import Follower
from jaxserve.engine.hosts.joining import JOIN_SECONDS, connect_to_leader, listen_for_followers
from jaxserve.engine.hosts.leader import Followers
from jaxserve.engine.settle import Settings, with_pages
from jaxserve.errors import JaxserveError
from jaxserve.loading.checkpoint import AnyCheckpoint
from jaxserve.loading.sameness import weights_digest

logger = logging.getLogger(__name__)

SECOND_HAND_SECONDS = 2.0  # in which a host hears of a lost one whose connections have broken
_MOST_TOLD = 64  # characters of a fact


def meet_followers(config: EngineConfig) -> Followers:
    """On the first host: wait for the others.  Before anything of JAX, which would wait for them in its own way.

    Until somebody else watches the followers, losing one ends this process: it may wait for them in a program.
    """
    followers = Followers(listen_for_followers(config), config.nnodes - 1)
    with told_to(followers):
        followers.gather(JOIN_SECONDS)
    followers.watch(end_process)
    return followers


@contextmanager
def told_to(followers: Followers) -> Iterator[None]:
    """Let the followers go with what goes wrong meanwhile on the first host."""
    try:
        yield
    except BaseException as error:
        if _may_be_second_hand(error) and (loss := followers.loss(SECOND_HAND_SECONDS)) is not None:
            error = loss
        followers.end(reason(error))
        raise error


def agree_with_followers(
    followers: Followers, config: EngineConfig, checkpoint: AnyCheckpoint | None, settings: Settings
) -> Settings:
    """On the first host: the settings with as many pages as fit everywhere.

    Raises ConfigError for a host that is about to build something else.
    """
    facts = _facts(config, checkpoint, settings)
    return with_pages(settings, followers.agree(facts, settings.memory.num_pages))


def follow(
    config: EngineConfig,
    checkpoint: AnyCheckpoint | None,
    model: ModelConfig,
    processor: ImageProcessorConfig | None,
) -> None:
    """On the other hosts: build the same runner, and do what the first host plans until it ends.

    Raises ConfigError and CheckpointError as build_client does, on this host and on the first one.
    """
    follower = Follower(connect_to_leader(config), end_process)
    try:
        follower.wait()
        settings, devices = settle_engine(config, model, processor)
        facts = _facts(config, checkpoint, settings)
        settings = with_pages(settings, follower.agree(facts, settings.memory.num_pages))
        runner = build_runner(config, checkpoint, settings, devices)
        _outlive_the_first_host()
        logger.info("node_rank %d is ready", config.node_rank)
        follower.run(runner)
    except BaseException as error:
        if _may_be_second_hand(error):
            time.sleep(SECOND_HAND_SECONDS)  # the first host shall hear of the lost one first
        follower.leave(reason(error))
        raise
    follower.leave()


def reason(error: BaseException) -> str:
    """An error in one line, as other hosts are told of it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, JaxserveError) else f"{type(error).__name__}: {error}"


def end_process(error: BaseException, *, quietly: bool = False) -> NoReturn:
    """Here and now, with status 1, or after Ctrl-C with 130, as shells report it.

    For hosts that cannot do anything alone: their threads may be in a program that waits for the lost one.  `quietly`
    where there is nothing to say of the error.
    """
    if not quietly:
        unexpected = None if isinstance(error, JaxserveError | KeyboardInterrupt) else error
        logger.critical("%s; this process ends", reason(error), exc_info=unexpected)
    logging.shutdown()
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _facts(config: EngineConfig, checkpoint: AnyCheckpoint | None, settings: Settings) -> dict[str, str]:
    """Everything that makes programs, weights and plans what they are, by name; memory is agreed upon apart."""
    facts: dict[str, object] = {
        "jaxserve": __version__,
        "JAX": jax.__version__,
        "weights": f"random, seed {config.seed}" if checkpoint is None else weights_digest(checkpoint),
    }
    for field in fields(Settings):
        facts[field.name] = getattr(settings, field.name)
    facts["memory"] = replace(settings.memory, available=0, num_pages=0)
    return {name: _short(str(value)) for name, value in facts.items()}


def _short(text: str) -> str:
    """A digest of what is too long to tell."""
    return text if len(text) <= _MOST_TOLD else hashlib.sha256(text.encode()).hexdigest()


def _may_be_second_hand(error: BaseException) -> bool:
    """Whether a program may have broken for want of another host."""
    return not isinstance(error, JaxserveError | KeyboardInterrupt)


def _outlive_the_first_host() -> None:
    """Take a first SIGTERM for one that all hosts got: the first one's answers may end, and then this one does."""

    def stay(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        logger.info("SIGTERM: this host ends when node_rank 0 does; a second one ends it at once")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stay)
