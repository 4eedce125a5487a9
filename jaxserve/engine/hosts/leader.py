"""The first host's side: followers, and a runner that has them do what it does."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import jax
import numpy as np

from jaxserve.engine.hosts.joining import REMINDER_SECONDS
from jaxserve.engine.hosts.link import Link, LinkLostError
from jaxserve.engine.hosts.messages import (
    Admit,
    Agreed,
    Dispatch,
    End,
    Finish,
    Hello,
    Message,
    Settled,
    Start,
    Welcome,
)
from jaxserve.engine.pending_step import PendingStep
from jaxserve.engine.plan import Admission, StepPlan, StepResult
from jaxserve.engine.runner import Runner
from jaxserve.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LAST_WORDS_SECONDS = 1.0  # in which what a host said before it went is read, by another thread
_MOST_SHOWN = 24  # characters of a value that two hosts do not share


class Followers:
    """The other hosts of an engine.  Losing one of them is the end of it: a part of the model is gone."""

    def __init__(self, listener: socket.socket, num_followers: int) -> None:
        """Takes a socket that listens; nobody has to be there yet."""
        self._listener = listener
        self._num_followers = num_followers
        self._links: dict[int, Link] = {}
        self._settled: queue.SimpleQueue[tuple[int, Settled]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._error: EngineDeadError | None = None
        self._has_lost = threading.Event()
        self._on_lost: Callable[[EngineDeadError], None] | None = None
        self._is_ending = False

    def gather(self, timeout: float) -> None:
        """Until all have come.  Raises ConfigError for one that is none of them, or that stays away."""
        deadline, reminder = time.monotonic() + timeout, time.monotonic()
        self._listener.settimeout(_POLL_SECONDS)
        while missing := sorted(set(range(1, self._num_followers + 1)) - set(self._links)):
            self._check()
            named = f"--node-rank {' and '.join(map(str, missing))}"
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"nnodes={self._num_followers + 1}: nobody came with {named} within {timeout:g} s; "
                    "start it on its host"
                )
            if time.monotonic() >= reminder:
                logger.info("waiting at port %d for %s", self._listener.getsockname()[1], named)
                reminder += REMINDER_SECONDS
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                link = Link(sock)
            except OSError:
                continue  # it looked whether anybody listens
            self._take_in(link)
        self._listener.close()  # who comes now is one too many
        self.tell(Welcome())

    def agree(self, facts: Mapping[str, str], num_pages: int) -> int:
        """Until all have settled like this host.  The number of pages that fit everywhere, `num_pages` fitting here.

        Raises ConfigError for one of whom other `facts` are true.
        """
        settled: dict[int, Settled] = {}
        while len(settled) < self._num_followers:
            self._check()
            try:
                rank, found = self._settled.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if found.facts != facts:
                raise ConfigError(
                    f"node_rank={rank} differs from rank 0 in {_differences(found.facts, facts)}; all hosts need the "
                    "same model, flags and versions"
                )
            settled[rank] = found
        agreed = min(num_pages, *(found.num_pages for found in settled.values()))
        self.tell(Agreed(agreed))
        return agreed

    def watch(self, on_lost: Callable[[EngineDeadError], None]) -> None:
        """Call `on_lost` once, on another thread, when a follower is lost; at once if one is already."""
        with self._lock:
            self._on_lost = on_lost
            error = self._error
        if error is not None:
            on_lost(error)

    def loss(self, timeout: float) -> EngineDeadError | None:
        """Who was lost, or is within so many seconds; None if nobody is."""
        self._has_lost.wait(timeout)
        return self._error

    def be_prompt(self) -> None:
        """Expect followers to be as quick as hosts that serve."""
        for link in self._links.values():
            link.be_prompt()

    def tell(self, message: Message) -> None:
        """Send a message to all.  Raises EngineDeadError if one is lost."""
        for rank, link in self._links.items():
            self._check()
            try:
                link.send(message)
            except LinkLostError as error:
                raise self.loss(_LAST_WORDS_SECONDS) or self._lose(rank, str(error)) from error

    def end(self, error: str = "") -> None:
        """Let the followers go."""
        self._is_ending = True
        self._dismiss(error)
        for link in self._links.values():
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
            with suppress(LinkLostError):  # then it has gone by itself
                link.send(End(problem))
            link.close()
            raise ConfigError(problem)
        assert isinstance(hello, Hello)
        link.be_patient()
        self._links[hello.rank] = link
        logger.info("node_rank %d is here, from %s", hello.rank, link.peer)
        threading.Thread(
            target=self._listen, args=(hello.rank, link), name=f"follower-{hello.rank}", daemon=True
        ).start()

    def _problem(self, hello: Message) -> str | None:
        num_hosts = self._num_followers + 1
        if not isinstance(hello, Hello):
            return "a follower did not begin with its rank"
        if hello.num_hosts != num_hosts:
            return f"nnodes={hello.num_hosts} on node_rank {hello.rank}: it is {num_hosts} on rank 0"
        if hello.rank in self._links or not 1 <= hello.rank < num_hosts:
            return f"node_rank={hello.rank}: another host has it, or nnodes={num_hosts} has no such rank"
        return None

    def _listen(self, rank: int, link: Link) -> None:
        try:
            while isinstance(message := link.receive(), Settled):
                self._settled.put((rank, message))
        except LinkLostError as error:
            why = str(error)
        else:
            why = message.error if isinstance(message, End) and message.error else f"it said {message}"
        if not self._is_ending:
            self._lose(rank, why)

    def _check(self) -> None:
        """Raise EngineDeadError if a follower is lost."""
        if self._error is not None:
            raise self._error

    def _lose(self, rank: int, why: str) -> EngineDeadError:
        with self._lock:
            if self._error is not None:
                return self._error
            host = self._links[rank].peer
            error = self._error = EngineDeadError(
                f"lost node_rank {rank} of {self._num_followers + 1} (at {host}): {why}"
            )
            on_lost = self._on_lost
        self._has_lost.set()
        logger.error("%s", error)
        if on_lost is not None:
            on_lost(error)
        self._dismiss(str(error))
        return error

    def _dismiss(self, why: str) -> None:
        """Tell whoever is still there that this is the end."""
        for link in list(self._links.values()):  # others may be coming
            with suppress(LinkLostError):  # then it has gone by itself
                link.send(End(why))


def _differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """What is not the same on two hosts, long values by name only."""
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    pairs = {name: (theirs.get(name, "nothing"), ours.get(name, "nothing")) for name in names}
    told = [
        f"{name} ({', not '.join(pair)})" if max(map(len, pair)) <= _MOST_SHOWN else name
        for name, pair in pairs.items()
    ]
    return ", ".join(told)


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
