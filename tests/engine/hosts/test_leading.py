"""What several hosts ask of the rest of an engine: flags, devices, and a client that ends while its step hangs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from jaxserve.cli.engine_flags import engine_config
from jaxserve.cli.main import parse
from jaxserve.config import EngineConfig
from jaxserve.engine import client as client_module
from jaxserve.engine import devices as devices_module
from jaxserve.engine.client import InProcessClient
from jaxserve.engine.core import EngineCore
from jaxserve.engine.devices import engine_devices
from jaxserve.engine.hosts import leading_client
from jaxserve.engine.hosts.joining import listen_for_followers
from jaxserve.engine.hosts.leader import Followers, LeadingRunner
from jaxserve.engine.hosts.leading_client import LeadingClient
from jaxserve.engine.hosts.messages import Start, decode, encode
from jaxserve.engine.plan import Admission, Encode, StepPlan
from jaxserve.engine.protocol import ImageInput
from jaxserve.engine.runner import Runner
from jaxserve.errors import ConfigError, EngineDeadError, RequestError
from tests.engine.hosts.following_host import FollowingHost, meet
from tests.engine.tiny_engine import Collector, request
from tests.patience import PATIENCE
from tests.scripted import scripted_info


def two_hosts(**options: Any) -> EngineConfig:
    settings = {"nnodes": 2, "master_addr": "10.0.0.1", "tensor_parallel_size": 4} | options
    return EngineConfig("m", **settings)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"node_rank": 2}, "node_rank=2: must be from 0 to 1, with nnodes=2"),
        ({"node_rank": -1}, "node_rank=-1"),
        ({"master_addr": None}, "master_addr=None: several hosts need it"),
        ({"master_port": 65535}, "master_port=65535"),
        ({"tensor_parallel_size": 5}, "tensor_parallel_size=5: must be a multiple of nnodes=2"),
        ({"data_parallel_size": 2}, "data_parallel_size=2: an engine over several hosts"),
        ({"nnodes": 0}, "nnodes=0: must be a whole number, at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    two_hosts()
    with pytest.raises(ConfigError, match=says):
        two_hosts(**options)


def test_hosts_may_be_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "3000",
    }.items():
        monkeypatch.setenv(name, value)
    config = engine_config(parse(["serve", "m", "-tp", "2", "--master-port", "4000"]))
    assert (config.nnodes, config.node_rank) == (2, 1)
    assert (config.master_addr, config.master_port) == ("head", 4000)


def test_every_host_has_an_equal_share_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SimpleNamespace(id=i, process_index=i // 4) for i in range(6)]
    monkeypatch.setattr(devices_module, "find_devices", lambda config: devices)
    found = engine_devices(two_hosts())
    assert [device.id for device in found] == [0, 1, 4, 5]
    with pytest.raises(ConfigError, match="node_rank 1 has 2 devices, and needs 3"):
        engine_devices(two_hosts(tensor_parallel_size=6))


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        config = two_hosts(master_port=port - 1)
        with pytest.raises(ConfigError, match=f"the port behind it, {port}, cannot be had"):
            listen_for_followers(config)


def test_followers_are_sent_each_image_once() -> None:
    told: list[bytes] = []
    image = ImageInput(
        pixels=bytes(100_000), grid_thw=(1, 2, 2), content_hash="c0ffee", offset=0, num_tokens=1
    )
    admission = Admission(slot=0, request=replace(request("a", [1, 2]), images=(image,)), token_ids=(1, 2))
    encodes = (Encode(image=image, pages=(0,)),)
    plan = StepPlan(admissions=(admission,), entries=(), encodes=encodes)
    runner: Any = MagicMock(spec=Runner)
    followers: Any = SimpleNamespace(tell=lambda message: told.append(encode(message)))
    leading = LeadingRunner(runner, followers)
    leading.admit(admission)
    leading.finish(plan, leading.start(plan), {})
    assert 100_000 < sum(map(len, told)) < 110_000
    found = decode(told[1])
    assert isinstance(found, Start)
    assert found.plan.encodes == encodes
    leading.dispatch(plan)
    assert 100_000 < len(told[-1]) < 110_000
    runner.dispatch.assert_called_once_with(plan)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RequestError("prompts[3]: too long", param="prompts"), "prompts[3]: too long"),
        (OSError("no space"), "OSError: no space"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(0), ""),
        (None, ""),
    ],
)
def test_followers_are_told_of_the_error_that_their_leader_ends_with(
    error: BaseException | None, told: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        followers = Followers(listener, 1)
        host = FollowingHost(listener.getsockname()[1], 1)
        meet(followers)
        core: Any = MagicMock(spec=EngineCore)
        client = LeadingClient(core, scripted_info(), followers, forbid_recompile=False, grammars=None)
        try:
            if error is not None:
                raise error
        except BaseException:  # noqa: BLE001  # as in `with`
            client.shutdown()
        else:
            client.shutdown()
        end = host.end.get(timeout=PATIENCE)
        assert ("" if end is None else str(end)) == (f"node_rank 0 ended: {told}" if told else "")


class HangingCore:
    """An engine whose step waits for what never comes."""

    has_work = True

    def __init__(self) -> None:
        self.is_stepping, self.may_end, self.has_broken = (threading.Event() for _ in range(3))

    def start(self, prepare: Callable[[], None]) -> None:
        pass

    def stop(self) -> None:
        pass

    def step(self) -> list[Any]:
        self.is_stepping.set()
        self.may_end.wait(PATIENCE)
        self.has_broken.set()
        raise RuntimeError("the collective failed")


@pytest.mark.parametrize("is_first", [True, False], ids=["before its step breaks", "after"])
def test_a_lost_follower_ends_the_engine_and_is_named(
    is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LAST_SECONDS", 0.05)
    monkeypatch.setattr(leading_client, "SECOND_HAND_SECONDS", PATIENCE)
    core, collector, deaths = HangingCore(), Collector(), []

    def on_dead(error: Exception) -> None:
        deaths.append(str(error))
        collector.on_dead(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        followers = Followers(listener, 1)
        host = FollowingHost(listener.getsockname()[1], 1)
        meet(followers)
        client: Any = LeadingClient(
            core,  # type: ignore[arg-type]  # as much of a core as is needed
            scripted_info(),
            followers,
            forbid_recompile=False,
            grammars=None,
        )
        client.start(collector.on_outputs, on_dead)
        assert core.is_stepping.wait(PATIENCE)
        if not is_first:
            core.may_end.set()
            assert core.has_broken.wait(PATIENCE)
        host.vanish()
        collector.wait("nobody")
        with pytest.raises(EngineDeadError, match="node_rank 1 of 2"):
            client.submit([request("a", [1])])
        client.shutdown()
        assert isinstance(host.end.get(timeout=PATIENCE), EngineDeadError)
    core.may_end.set()
    client._thread.join(PATIENCE)
    assert deaths == ["lost node_rank 1 of 2 (at 127.0.0.1): it closed the connection"]


@pytest.mark.parametrize("ask", [InProcessClient.shutdown, InProcessClient.reset_prefix_cache])
def test_who_waits_for_a_step_is_let_go_when_the_engine_fails(
    ask: Callable[[InProcessClient], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is lost while the engine drains: its step never ends."""
    monkeypatch.setattr(client_module, "_LAST_SECONDS", 0.05)
    monkeypatch.setattr(client_module, "_POLL_SECONDS", 0.05)
    core, collector = HangingCore(), Collector()
    client = InProcessClient(
        core,  # type: ignore[arg-type]  # as much of a core as is needed
        scripted_info(),
        forbid_recompile=False,
    )
    client.start(collector.on_outputs, collector.on_dead)
    assert core.is_stepping.wait(PATIENCE)
    asking = threading.Thread(target=ask, args=(client,), daemon=True)
    asking.start()
    asking.join(0.2)
    assert asking.is_alive(), "the step is not over"
    client.fail(EngineDeadError("lost node_rank 1"))
    asking.join(PATIENCE)
    is_let_go = not asking.is_alive()
    core.may_end.set()
    client.shutdown()
    assert client._thread is not None
    client._thread.join(PATIENCE)  # what it logs at its end is nobody else's
    assert is_let_go
