"""A leader and its followers on loopback, with runners that note what they are told."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxserve.engine.hosts.follower import Follower
from jaxserve.engine.hosts.leader import Followers
from jaxserve.engine.hosts.link import Link
from jaxserve.engine.hosts.messages import Hello
from jaxserve.engine.plan import Admission, PlanEntry, StepPlan
from jaxserve.errors import EngineDeadError
from tests.patience import PATIENCE


class NotingRunner:
    """A Runner that only remembers."""

    def __init__(self, refused_slot: int = -1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._refused_slot = refused_slot

    def admit(self, admission: Admission) -> None:
        self.calls.append(("admit", admission))
        if admission.slot == self._refused_slot:
            raise ValueError("no such slot")

    def dispatch(self, plan: StepPlan) -> Any:
        self.calls.append(("dispatch", plan))
        return plan

    def start(self, plan: StepPlan) -> Any:
        self.calls.append(("start", plan))
        return plan

    def finish(self, plan: StepPlan, outputs: Any, allowed: dict[int, np.ndarray]) -> Any:
        assert outputs == plan
        masks = {row: mask.tolist() for row, mask in allowed.items()}
        self.calls.append(("finish", plan, masks))
        return plan

    def fetch(self, pending: StepPlan) -> Any:
        return pending.entries[0].start


FACTS = {"max_num_seqs": "4", "model": "small"}  # that all hosts have in common


class FollowingHost:
    """A follower on a thread: what it did, and how it ended."""

    def __init__(
        self,
        port: int,
        rank: int,
        *,
        num_hosts: int = 2,
        facts: dict[str, str] = FACTS,
        runner: NotingRunner | None = None,
    ) -> None:
        self.runner = runner or NotingRunner()
        self.end: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[EngineDeadError] = queue.SimpleQueue()
        self.link = Link(socket.create_connection(("127.0.0.1", port)))
        self.link.send(Hello(rank, num_hosts))
        self.follower = Follower(self.link, self.lost.put)
        threading.Thread(target=self._run, args=(facts, 40 + rank), daemon=True).start()

    def vanish(self) -> None:
        """Say no more, as if the process were gone; who closes with a beat unread would reset the connection."""
        self.link._socket.shutdown(socket.SHUT_WR)

    def _run(self, facts: dict[str, str], num_pages: int) -> None:
        try:
            self.follower.wait()
            self.num_pages = self.follower.agree(facts, num_pages)
            self.follower.run(self.runner)  # type: ignore[arg-type]  # as much of a runner as is needed
        except EngineDeadError as error:
            self.follower.leave(str(error))
            self.end.put(error)
        else:
            self.follower.leave()
            self.end.put(None)


@contextlib.contextmanager
def leader(num_followers: int) -> Iterator[tuple[Followers, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        followers = Followers(listener, num_followers)
        try:
            yield followers, listener.getsockname()[1]
        finally:
            followers.end()


def meet(followers: Followers) -> int:
    followers.gather(PATIENCE)
    return followers.agree(FACTS, 50)


def plan(start: int) -> StepPlan:
    entry = PlanEntry(
        seq_id=1,
        slot=0,
        start=start,
        token_ids=(-1,),
        samples=True,
        num_generated=start,
        page_offset=0,
        new_pages=(),
    )
    return StepPlan(admissions=(), entries=(entry,))
