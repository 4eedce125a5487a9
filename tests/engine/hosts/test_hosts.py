"""A leader and its followers: who acts, and who is missed."""

from __future__ import annotations

import itertools
import queue
import random
import socket
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.hosts import joining
from jaxserve.engine.hosts import leader as leader_module
from jaxserve.engine.hosts import link as link_module
from jaxserve.engine.hosts.follower import Follower
from jaxserve.engine.hosts.joining import connect_to_leader
from jaxserve.engine.hosts.leader import LeadingRunner
from jaxserve.engine.hosts.link import LOST_SECONDS, Link, LinkLostError
from jaxserve.engine.hosts.messages import Dispatch, End, Hello, Message, decode
from jaxserve.engine.plan import Admission
from jaxserve.errors import ConfigError, EngineDeadError
from tests.engine.hosts.clock import HostsClock
from tests.engine.hosts.following_host import FACTS, FollowingHost, NotingRunner, leader, meet, plan
from tests.engine.tiny_engine import request
from tests.patience import PATIENCE


def test_followers_do_all_that_the_leader_does_in_its_order() -> None:
    with leader(2) as (followers, port):
        hosts = [FollowingHost(port, rank, num_hosts=3) for rank in (2, 1)]
        assert meet(followers) == 41  # what fits everywhere
        own = NotingRunner()
        runner = LeadingRunner(own, followers)  # type: ignore[arg-type]  # as much of a runner as is needed
        rng = random.Random(0)
        for step in range(60):
            kind = rng.choice(["admit", "dispatch", "constrained"])
            if kind == "admit":
                admission = Admission(slot=step % 4, request=request(f"r{step}", [step]), token_ids=(step,))
                runner.admit(admission)
            elif kind == "dispatch":
                assert runner.fetch(runner.dispatch(plan(step))) == step  # type: ignore[comparison-overlap]
            else:
                outputs = runner.start(plan(step))
                runner.finish(plan(step), outputs, {0: np.array([step, 7], np.uint32)})
        followers.end()
        for host in hosts:
            assert host.end.get(timeout=PATIENCE) is None
            assert host.num_pages == 41
            assert host.runner.calls == own.calls


def test_what_a_runner_refuses_is_refused_on_all_hosts_and_the_rest_goes_on() -> None:
    with leader(1) as (followers, port):
        host = FollowingHost(port, 1, runner=NotingRunner(refused_slot=3))
        meet(followers)
        own = NotingRunner(refused_slot=3)
        runner = LeadingRunner(own, followers)  # type: ignore[arg-type]  # as much of a runner as is needed
        with pytest.raises(ValueError, match="no such slot"):
            runner.admit(Admission(slot=3, request=request("a", [1]), token_ids=(1,)))
        runner.dispatch(plan(0))
        runner.admit(Admission(slot=0, request=request("b", [1]), token_ids=(1,)))
        runner.dispatch(plan(1))
        followers.end()
        assert host.end.get(timeout=PATIENCE) is None
        assert host.runner.calls == own.calls


def test_a_follower_that_alone_refuses_something_does_not_go_on_with_it() -> None:
    with leader(1) as (followers, port):
        host = FollowingHost(port, 1, runner=NotingRunner(refused_slot=0))
        meet(followers)
        runner = LeadingRunner(NotingRunner(), followers)  # type: ignore[arg-type]  # as much of a runner as is needed
        runner.admit(Admission(slot=0, request=request("a", [1]), token_ids=(1,)))
        runner.dispatch(plan(0))
        assert "could not set up a request that node_rank 0 goes on with" in str(
            host.end.get(timeout=PATIENCE)
        )
        assert [call[0] for call in host.runner.calls] == ["admit"]


def test_a_lost_follower_is_named_at_once_and_nothing_more_is_dispatched() -> None:
    with leader(2) as (followers, port):
        hosts = [FollowingHost(port, rank, num_hosts=3) for rank in (1, 2)]
        meet(followers)
        lost: queue.SimpleQueue[EngineDeadError] = queue.SimpleQueue()
        followers.watch(lost.put)
        hosts[1].vanish()
        error = lost.get(timeout=PATIENCE)
        assert str(error) == "lost node_rank 2 of 3 (at 127.0.0.1): it closed the connection"
        assert str(hosts[0].lost.get(timeout=PATIENCE)) == f"node_rank 0 ended: {error}"
        runner = LeadingRunner(NotingRunner(), followers)  # type: ignore[arg-type]  # as above
        with pytest.raises(EngineDeadError, match="node_rank 2"):
            runner.dispatch(plan(0))
        followers.watch(lost.put)  # who asks late is told at once
        assert lost.get(timeout=PATIENCE) is error
        assert lost.empty()


def test_a_follower_that_hangs_is_lost_too(clock: HostsClock, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: queue.SimpleQueue[EngineDeadError] = queue.SimpleQueue()
    beats, many = itertools.count(1), threading.Event()

    def decoded(data: bytes) -> Message:
        message = decode(data)
        if threading.current_thread().name == "follower-1" and not many.is_set():
            clock.turn(0.6 * LOST_SECONDS)  # from one message of the follower to the next
            if next(beats) == 5:
                many.set()
        return message

    monkeypatch.setattr(link_module, "LOST_SECONDS_AT_START", 1e9)  # of the leader, to the follower
    with leader(1) as (followers, port):
        host = FollowingHost(port, 1)
        meet(followers)
        followers.watch(lost.put)
        followers.be_prompt()
        monkeypatch.setattr(link_module, "decode", decoded)
        assert many.wait(PATIENCE)
        assert lost.empty()  # it has nothing to say, and is there
        monkeypatch.setattr(host.link, "send", lambda message: None)
        assert "node_rank 1 of 2 (at 127.0.0.1): it has said nothing for 6 s" in str(clock.outlast(lost))


def test_a_follower_that_hangs_when_serving_begins_is_not_waited_for_any_longer(
    clock: HostsClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: queue.SimpleQueue[EngineDeadError] = queue.SimpleQueue()
    with leader(1) as (followers, port):
        host = FollowingHost(port, 1)
        meet(followers)
        followers.watch(lost.put)
        monkeypatch.setattr(host.link, "send", lambda message: None)
        clock.turn(LOST_SECONDS + 1)
        clock.wait_until_seen("follower-1")
        assert lost.empty()  # it may be building
        followers.be_prompt()
        assert "it has said nothing for 6 s" in str(clock.outlast(lost))


def test_followers_end_when_the_leader_does() -> None:
    with leader(1) as (followers, port):
        host = FollowingHost(port, 1)
        meet(followers)
        followers.end("out of memory")
        assert str(host.lost.get(timeout=PATIENCE)) == "node_rank 0 ended: out of memory"
        assert isinstance(host.end.get(timeout=PATIENCE), EngineDeadError)
    with leader(1) as (followers, port):
        host = FollowingHost(port, 1)
        meet(followers)
        for link in followers._links.values():
            link.close()  # as if the process had been killed
        assert "lost node_rank 0 (at 127.0.0.1)" in str(host.lost.get(timeout=PATIENCE))
        assert isinstance(host.end.get(timeout=PATIENCE), EngineDeadError)


@pytest.mark.parametrize(
    ("rank", "num_hosts", "says"),
    [
        (5, 2, "node_rank=5: another host has it, or nnodes=2 has no such rank"),
        (1, 4, "nnodes=4 on node_rank 1: it is 2 on rank 0"),
    ],
)
def test_a_follower_of_somebody_else_is_refused_on_both_sides(rank: int, num_hosts: int, says: str) -> None:
    with leader(1) as (followers, port):
        host = FollowingHost(port, rank, num_hosts=num_hosts)
        with pytest.raises(ConfigError, match=says):
            followers.gather(PATIENCE)
        assert says in str(host.lost.get(timeout=PATIENCE))


def test_of_two_hosts_with_one_rank_the_second_is_refused() -> None:
    with leader(2) as (followers, port):
        hosts = [FollowingHost(port, 1, num_hosts=3) for _ in range(2)]
        with pytest.raises(ConfigError, match="node_rank=1: another host has it"):
            followers.gather(PATIENCE)
        followers.end()
        ends = sorted(str(host.end.get(timeout=PATIENCE)) for host in hosts)
        assert ends[0] == "node_rank 0 ended"
        assert "another host has it" in ends[1]


def test_a_follower_that_would_build_something_else_is_told_what_differs() -> None:
    facts = FACTS | {"model": "x" * 64, "max_num_seqs": "3"}
    with leader(1) as (followers, port):
        host = FollowingHost(port, 1, facts=facts)
        followers.gather(PATIENCE)
        with pytest.raises(ConfigError) as error:
            followers.agree(FACTS, 50)
        followers.end(str(error.value))
        assert str(error.value).startswith(
            "node_rank=1 differs from rank 0 in max_num_seqs (3, not 4), model; all"
        )
        assert "differs from rank 0" in str(host.lost.get(timeout=PATIENCE))


def test_a_follower_that_cannot_go_on_says_why() -> None:
    lost: queue.SimpleQueue[EngineDeadError] = queue.SimpleQueue()
    with leader(1) as (followers, port):
        link = Link(socket.create_connection(("127.0.0.1", port)))
        link.send(Hello(1, 2))
        follower = Follower(link, lost.put)
        followers.gather(PATIENCE)
        follower.wait()
        follower.leave("max_model_len=9: too long")
        with pytest.raises(EngineDeadError, match=r"lost node_rank 1 of 2 .*: max_model_len=9: too long"):
            followers.agree(FACTS, 50)
    assert lost.empty(), "it has left by itself"


def test_why_a_follower_left_is_heard_by_who_finds_its_connection_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader_module, "_LAST_WORDS_SECONDS", PATIENCE)
    honest, is_broken = Link.send, threading.Event()

    def send(link: Link, message: Message) -> None:
        if isinstance(message, Dispatch):
            is_broken.set()
            raise LinkLostError("the connection is broken (Broken pipe)")
        honest(link, message)

    def decoded(data: bytes) -> Message:
        message = decode(data)
        if isinstance(message, End) and message.error == "out of memory":
            assert is_broken.wait(PATIENCE)
        return message

    with leader(1) as (followers, port):
        host = FollowingHost(port, 1)
        meet(followers)
        monkeypatch.setattr(Link, "send", send)
        monkeypatch.setattr(link_module, "decode", decoded)
        host.link.send(End("out of memory"))
        runner = LeadingRunner(NotingRunner(), followers)  # type: ignore[arg-type]  # as much of a runner as is needed
        with pytest.raises(
            EngineDeadError, match=r"lost node_rank 1 of 2 \(at 127\.0\.0\.1\): out of memory"
        ):
            runner.dispatch(plan(0))


def test_a_probe_that_hangs_up_at_once_is_nobody() -> None:
    with leader(1) as (followers, port):
        probe = socket.create_connection(("127.0.0.1", port))
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # with a reset
        probe.close()
        host = FollowingHost(port, 1)
        assert meet(followers) == 41
        followers.end()
        assert host.end.get(timeout=PATIENCE) is None


def test_a_follower_tries_again_where_a_proxy_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_RETRY_SECONDS", 0.05)
    with leader(1) as (followers, port):
        config = EngineConfig(
            "m", nnodes=2, node_rank=1, tensor_parallel_size=2, master_addr="127.0.0.1", master_port=port - 1
        )
        honest, num_calls = Link.send, iter(range(3))

        def send(link: Link, message: Message) -> None:
            if next(num_calls, None) is not None:
                raise LinkLostError("the connection is broken (Connection reset by peer)")
            honest(link, message)

        monkeypatch.setattr(Link, "send", send)
        link = connect_to_leader(config)
        assert next(num_calls, None) is None
        followers.gather(PATIENCE)
        link.close()


def test_a_stranger_is_turned_away_and_who_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with leader(2) as (followers, port):
        passed = SimpleNamespace(monotonic=lambda: 1.0 if followers._links else 0.0)
        monkeypatch.setattr(leader_module, "time", passed)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            host = FollowingHost(port, 2, num_hosts=3)
            with pytest.raises(ConfigError, match=r"nobody came with --node-rank 1 within 0\.5 s"):
                followers.gather(0.5)
        followers.end()
        assert str(host.end.get(timeout=PATIENCE)) == "node_rank 0 ended"
