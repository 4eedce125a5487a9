"""The first host's side: followers, and a runner that has them do what it does."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import numpy as np

from jaxserve.engine.hosts.link import Link, LinkLostError
from jaxserve.engine.hosts.messages import Admit, Dispatch, End, Finish, Hello, Message, Start, Welcome
from jaxserve.engine.pending_step import PendingStep
from jaxserve.engine.plan import Admission, StepPlan, StepResult
from jaxserve.engine.runner import Runner
from jaxserve.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


class Followers:
    """The other hosts of an engine.  Losing one of them is the end of it: a part of the model is gone."""

    def __init__(self, listener: socket.socket, num_followers: int, fingerprint: str) -> None:
        """Takes a socket that listens; nobody has to be there yet."""
        self._listener = listener
        self._num_followers = num_followers
        self._fingerprint = fingerprint
        self._links: dict[int, Link] = {}
        self._num_pages: list[int] = []
        self._lock = threading.Lock()
        self._error: EngineDeadError | None = None
        self._on_lost: Callable[[EngineDeadError], None] | None = None
        self._is_ending = False

    def wait(self, timeout: float, num_pages: int) -> int:
        """Until all have come.  The number of pages that fit everywhere, `num_pages` fitting here.

        Raises ConfigError for one that is not like this host, or for one that stays away.
        """
        deadline = time.monotonic() + timeout
        self._listener.settimeout(_POLL_SECONDS)
        while len(self._links) < self._num_followers:
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, self._num_followers + 1)) - set(self._links))
                raise ConfigError(
                    f"nnodes={self._num_followers + 1}: nobody came with --node-rank "
                    f"{' and '.join(map(str, missing))} within {timeout:g} s; start it on its host"
                )
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._take_in(Link(sock))
        agreed = min([num_pages, *self._num_pages])
        self.tell(Welcome(agreed))
        return agreed

    def watch(self, on_lost: Callable[[EngineDeadError], None]) -> None:
        """Call `on_lost` once, on another thread, when a follower is lost; at once if one is already."""
        with self._lock:
            self._on_lost = on_lost
            error = self._error
        if error is not None:
            on_lost(error)

    def be_prompt(self) -> None:
        """Expect followers to be as quick as hosts that serve."""
        for link in self._links.values():
            link.be_prompt()

    def tell(self, message: Message) -> None:
        """Send a message to all.  Raises EngineDeadError if one is lost."""
        for rank, link in self._links.items():
            if self._error is not None:
                raise self._error
            try:
                link.send(message)
            except LinkLostError as error:
                raise self._lose(rank, str(error)) from error

    def end(self, error: str = "") -> None:
        """Let the followers go."""
        self._is_ending = True
        for link in self._links.values():
            try:
                link.send(End(error))
            except LinkLostError:
                pass  # it has gone by itself
            link.close()
        self._listener.close()

    def _take_in(self, link: Link) -> None:
        """Take a follower in, and watch it from now on."""
        try:
            hello = link.receive()
        except LinkLostError as error:
            logger.warning("somebody at %s is no follower: %s", link.peer, error)
            link.close()
            return
        problem = self._problem(hello)
        if problem is not None:
            link.send(End(problem))
            link.close()
            raise ConfigError(problem)
        assert isinstance(hello, Hello)
        link.be_patient()
        self._links[hello.rank] = link
        self._num_pages.append(hello.num_pages)
        logger.info("follower %d is here, from %s", hello.rank, link.peer)
        threading.Thread(
            target=self._listen, args=(hello.rank, link), name=f"follower-{hello.rank}", daemon=True
        ).start()

    def _problem(self, hello: Message) -> str | None:
        if not isinstance(hello, Hello):
            return "a follower did not begin with its rank"
        if hello.rank in self._links or not 1 <= hello.rank <= self._num_followers:
            return f"node_rank={hello.rank}: another host has it, or nnodes={self._num_followers + 1} has no such rank"
        if hello.fingerprint != self._fingerprint:
            return (
                f"node_rank={hello.rank} has another model, other flags or another version than rank 0: "
                f"{hello.fingerprint} and {self._fingerprint}"
            )
        return None

    def _listen(self, rank: int, link: Link) -> None:
        try:
            message = link.receive()
        except LinkLostError as error:
            why = str(error)
        else:
            why = message.error if isinstance(message, End) and message.error else f"it said {message}"
        if not self._is_ending:
            self._lose(rank, why)

    def _lose(self, rank: int, why: str) -> EngineDeadError:
        with self._lock:
            if self._error is not None:
                return self._error
            host = self._links[rank].peer
            error = self._error = EngineDeadError(
                f"lost node_rank {rank} of {self._num_followers + 1} (at {host}): {why}"
            )
            on_lost = self._on_lost
        logger.error("%s", error)
        if on_lost is not None:
            on_lost(error)
        return error


class LeadingRunner:
    """A Runner whose every step the followers make as well: arrays that lie on all hosts need all of them.

    Images may be hundreds of megabytes of a request.  They are told once, where a tower is to see them.
    """

    def __init__(self, runner: Runner, followers: Followers) -> None:
        self._runner = runner
        self._followers = followers

    def admit(self, admission: Admission) -> None:
        """See Runner."""
        request = replace(admission.request, images=())
        self._followers.tell(Admit(replace(admission, request=request)))
        self._runner.admit(admission)

    def dispatch(self, plan: StepPlan) -> PendingStep:
        """See Runner."""
        self._followers.tell(Dispatch(replace(plan, admissions=())))
        return self._runner.dispatch(plan)

    def start(self, plan: StepPlan) -> tuple[jax.Array, ...]:
        """See Runner."""
        self._followers.tell(Start(replace(plan, admissions=())))
        return self._runner.start(plan)

    def finish(
        self, plan: StepPlan, outputs: tuple[jax.Array, ...], allowed: Mapping[int, np.ndarray]
    ) -> PendingStep:
        """See Runner."""
        self._followers.tell(Finish.of(replace(plan, admissions=(), encodes=()), dict(allowed)))
        return self._runner.finish(plan, outputs, allowed)

    def fetch(self, pending: PendingStep) -> StepResult:
        """See Runner.  Every host has the results."""
        return self._runner.fetch(pending)
