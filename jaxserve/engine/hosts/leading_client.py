"""The client of an engine over several hosts, on the first of them."""

from __future__ import annotations

import sys

from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.building import build_runner, settle_engine
from jaxserve.engine.client import InProcessClient, make_core
from jaxserve.engine.core import EngineCore
from jaxserve.engine.hosts.leader import Followers, LeadingRunner
from jaxserve.engine.hosts.session import (
    SECOND_HAND_SECONDS,
    agree_with_followers,
    meet_followers,
    reason,
    told_to,
)
from jaxserve.engine.protocol import EngineInfo, OnDead, OnOutputs
from jaxserve.loading.checkpoint import AnyCheckpoint
from jaxserve.structured.compiler import GrammarCompiler


class LeadingClient(InProcessClient):
    """An engine that dies with any of its followers, at once."""

    def __init__(
        self,
        core: EngineCore,
        info: EngineInfo,
        followers: Followers,
        *,
        forbid_recompile: bool,
        grammars: GrammarCompiler | None,
    ) -> None:
        super().__init__(core, info, forbid_recompile=forbid_recompile, grammars=grammars)
        self._followers = followers

    def start(self, on_outputs: OnOutputs, on_dead: OnDead) -> None:
        """Start the step loop, and from now on take the loss of a follower for its end."""
        super().start(on_outputs, on_dead)
        self._followers.watch(self.fail)
        self._followers.be_prompt()

    def fail(self, error: Exception) -> None:
        """See InProcessClient.  A step that breaks for want of a host may say so first, and does not name it."""
        super().fail(self._followers.loss(SECOND_HAND_SECONDS) or error)

    def shutdown(self) -> None:
        """Stop after the step that runs, and let the followers go.

        They are told of the error that this is the end of: the engine's, or one that passes through the caller.
        """
        error = self._error or sys.exception()
        super().shutdown()
        is_failure = isinstance(error, Exception | KeyboardInterrupt)
        self._followers.end(reason(error) if is_failure else "")


def build_leading_client(
    config: EngineConfig,
    checkpoint: AnyCheckpoint | None,
    model: ModelConfig,
    grammars: GrammarCompiler | None,
    processor: ImageProcessorConfig | None,
) -> LeadingClient:
    """Wait for the other hosts, then build with them what build_client builds.  The client is not started."""
    followers = meet_followers(config)
    with told_to(followers):
        settings, devices = settle_engine(config, model, processor)
        settings = agree_with_followers(followers, config, checkpoint, settings)
        runner = build_runner(config, checkpoint, settings, devices)
    core, info = make_core(config, settings, LeadingRunner(runner, followers), grammars)
    return LeadingClient(core, info, followers, forbid_recompile=config.forbid_recompile, grammars=grammars)
