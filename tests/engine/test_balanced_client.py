"""Which of several engines gets a request, and what the front end is told of all of them; engines are scripted."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.balanced_client import BalancedClient, _Replica
from jaxserve.engine.pages import PageHash, hash_page
from jaxserve.engine.protocol import CoreRequest, ImageInput
from jaxserve.errors import EngineDeadError
from tests.engine.tiny_engine import Collector, request
from tests.patience import PATIENCE
from tests.scripted import ScriptedClient, scripted_info

PAGE = scripted_info().page_size


@contextmanager
def balanced(
    count: int = 2, **options: object
) -> Iterator[tuple[BalancedClient, list[ScriptedClient], Collector]]:
    """Replicas that stand still until they are told to go on."""
    info = scripted_info(**options)
    replicas = [ScriptedClient(info=info, stalled=True) for _ in range(count)]
    client, collector = BalancedClient(replicas), Collector()
    client.start(collector.on_outputs, collector.on_dead)
    try:
        yield client, replicas, collector
    finally:
        client.shutdown()


def who_has(replicas: list[ScriptedClient], request_id: str) -> int:
    (index,) = (
        i for i, one in enumerate(replicas) if request_id in [asked.request_id for asked in one.submitted]
    )
    return index


def send(
    client: BalancedClient, replicas: list[ScriptedClient], request_id: str, prompt: list[int], **options: str
) -> int:
    """Submit one request; the replica that got it."""
    client.submit([replace(request(request_id, prompt), **options)])  # type: ignore[arg-type]  # by name
    return who_has(replicas, request_id)


def fresh(seed: int, num_pages: float = 0.5) -> list[int]:
    """A prompt that begins like no other."""
    return random.Random(seed).choices(range(200), k=int(num_pages * PAGE))


def test_requests_spread_evenly_and_each_is_answered_once() -> None:
    with balanced(3) as (client, replicas, collector):
        asked = [request(f"r{i}", fresh(i)) for i in range(30)]
        client.submit(asked[:7])
        for one in asked[7:]:
            client.submit([one])
        assert [len(replica.submitted) for replica in replicas] == [10, 10, 10]
        for replica in replicas:
            replica.resume()
        collector.wait(*(one.request_id for one in asked))
        for one in asked:
            assert collector.tokens(one.request_id) == one.prompt_token_ids


def test_prompts_with_other_images_do_not_begin_alike() -> None:
    prompt = fresh(1, num_pages=3)

    def asked(request_id: str, content: str) -> CoreRequest:
        image = ImageInput(
            pixels=b"", grid_thw=(1, 4, 4), content_hash=content, offset=PAGE // 2, num_tokens=4
        )
        return replace(request(request_id, prompt), images=(image,))

    with balanced() as (client, replicas, _):
        for one in (asked("a", "cat"), asked("b", "dog"), asked("c", "cat")):
            client.submit([one])
        assert who_has(replicas, "a") == who_has(replicas, "c") != who_has(replicas, "b")


def test_siblings_are_looked_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request may have thousands, and nobody else is heard meanwhile."""
    looked_up = []
    look_up = _Replica.num_known

    def watched(replica: _Replica, hashes: Sequence[PageHash]) -> int:
        looked_up.append(replica)
        return look_up(replica, hashes)

    monkeypatch.setattr(_Replica, "num_known", watched)
    with balanced() as (client, replicas, _):
        one = request("r", fresh(1, num_pages=4))
        client.submit([replace(one, request_id=f"r{i}") for i in range(100)])
        assert [len(replica.submitted) for replica in replicas] == [50, 50]
    assert len(looked_up) == 4, "before and behind the first of each replica"


def test_a_finished_or_aborted_request_is_no_load_any_more() -> None:
    with balanced() as (client, replicas, collector):
        first = send(client, replicas, "a", fresh(1))
        other = send(client, replicas, "b", fresh(2))
        assert {first, other} == {0, 1}
        replicas[first].resume()
        collector.wait("a")
        assert send(client, replicas, "c", fresh(3)) == first
        client.abort(["b", "unknown"])
        assert replicas[other].aborted == ["b"]
        assert send(client, replicas, "d", fresh(4)) == other
        client.abort(["b", "a"])
        assert replicas[other].aborted == ["b"]  # nobody is told twice, nor of what has ended
        assert replicas[first].aborted == []


def test_a_long_prompt_counts_until_it_is_computed() -> None:
    with balanced(max_model_len=8192) as (client, replicas, _):
        long = send(client, replicas, "long", fresh(1, 128))
        assert [send(client, replicas, f"s{i}", fresh(10 + i)) for i in range(4)] == [1 - long] * 4
        replicas[long].step()  # it begins to answer
        assert [send(client, replicas, f"t{i}", fresh(20 + i)) for i in range(3)] == [long] * 3


def test_prompts_that_begin_alike_meet_until_their_replica_is_clearly_busier() -> None:
    with balanced(num_pages=256) as (client, replicas, _):
        prefix = fresh(1, 64)
        home = send(client, replicas, "first", prefix)
        replicas[home].step()
        answers = [send(client, replicas, f"next{i}", prefix + fresh(i)) for i in range(8)]
        assert answers[0] == answers[1] == home
        assert 1 - home in answers  # which then has the prefix as well
        assert abs(answers.count(home) - answers.count(1 - home)) <= 2


def test_a_salt_keeps_prompts_apart() -> None:
    with balanced() as (client, replicas, _):
        prefix = fresh(1, 2)
        home = send(client, replicas, "a", prefix, cache_salt="one")
        client.abort(["a"])
        assert send(client, replicas, "b", prefix, cache_salt="one") == home
        client.abort(["b"])
        turns = {send(client, replicas, f"o{i}", prefix, cache_salt=f"{i}") for i in range(2)}
        assert turns == {0, 1}


def test_the_answers_of_one_request_share_a_long_prompt_and_spread_with_a_short_one() -> None:
    with balanced() as (client, replicas, _):
        for name, num_pages, wanted in (("long", 128, {4}), ("short", 1, {2})):
            prompt = fresh(len(name), num_pages)
            client.submit([replace(request(f"{name}{i}", []), prompt_token_ids=prompt) for i in range(4)])
            homes = [who_has(replicas, f"{name}{i}") for i in range(4)]
            assert {homes.count(home) for home in homes} == wanted, name
            client.abort([f"{name}{i}" for i in range(4)])


@pytest.mark.parametrize("is_full", [False, True])
def test_what_a_cache_cannot_hold_any_more_is_forgotten(is_full: bool) -> None:
    names = (f"r{i}" for i in itertools.count())
    prompts = (fresh(i, 6) for i in itertools.count(100))

    def occupy(home: int, num_pages: int) -> str:
        """Give a replica, idle as the other one, a prompt of its own."""
        while send(client, replicas, name := next(names), next(prompts)[: num_pages * PAGE]) != home:
            client.abort([name])
        return name

    with balanced(num_pages=8) as (client, replicas, _):
        prefix = fresh(1, 4)
        home = send(client, replicas, "a", prefix)
        client.abort(["a"])
        if is_full:
            client.abort([occupy(home, 6)])
        occupy(home, 2)
        assert send(client, replicas, "other", next(prompts)[:PAGE]) == 1 - home
        assert send(client, replicas, "b", prefix) == (1 - home if is_full else home)


def test_stats_and_info_are_those_of_all() -> None:
    with balanced(3) as (client, replicas, _):
        client.submit([request(f"r{i}", fresh(i, 2)) for i in range(6)])
        stats, each = client.stats(), [replica.stats() for replica in replicas]
        assert stats.num_running == 6
        assert stats.num_pages == client.info.num_pages == 3 * scripted_info().num_pages
        assert stats.num_free_pages == sum(one.num_free_pages for one in each) < stats.num_pages
        assert client.info.max_num_seqs == 3 * scripted_info().max_num_seqs
        assert client.info.max_model_len == scripted_info().max_model_len
        assert client.info.device == "3 engines of cpu"
        assert not client.reset_prefix_cache()
        client.abort([f"r{i}" for i in range(6)])
        assert client.reset_prefix_cache()


def test_the_death_of_one_is_told_once_by_its_number_and_ends_all() -> None:
    with balanced() as (client, replicas, collector):
        client.submit([request("a", fresh(1)), request("b", fresh(2))])
        lost = who_has(replicas, "b")
        replicas[lost].die(RuntimeError("a cable was pulled"))
        collector.wait("b")
        assert str(collector.error) == f"replica {lost} of 2 died: a cable was pulled"
        replicas[1 - lost].wait_until(lambda: replicas[1 - lost].aborted == ["a"])
        with pytest.raises(EngineDeadError, match=f"replica {lost} of 2 died"):
            client.submit([request("c", fresh(3))])


def test_an_abort_comes_behind_its_request() -> None:
    """As when a replica dies while another thread submits."""
    with balanced(1) as (client, (replica,), _):
        submit, aborts = replica.submit, []

        def interrupted(requests: Sequence[CoreRequest]) -> None:
            aborts.append(threading.Thread(target=client.abort, args=(["a"],)))
            aborts[0].start()
            aborts[0].join(0.1)
            submit(requests)

        replica.submit = interrupted  # type: ignore[method-assign]
        client.submit([request("a", fresh(1))])
        aborts[0].join()
        assert replica.aborted == ["a"]
        assert replica.stats().num_running == 0


def test_nobody_waits_while_prompts_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be thousands, and engines have answers to tell meanwhile, or are shut down."""
    with balanced() as (client, replicas, _):
        others = [
            threading.Thread(target=client.abort, args=(["r"],)),
            threading.Thread(target=client.shutdown),
        ]

        def hash_slowly(parent: PageHash, token_ids: Sequence[int]) -> PageHash:
            while others:
                other = others.pop()
                other.start()
                other.join(PATIENCE)
                assert not other.is_alive()
            return hash_page(parent, token_ids)

        monkeypatch.setattr("jaxserve.engine.balanced_client.hash_page", hash_slowly)
        with pytest.raises(EngineDeadError, match="was shut down"):
            client.submit([request("r", fresh(1, num_pages=2))])
        assert not others
        assert not any(replica.submitted for replica in replicas)


def test_nothing_is_taken_after_a_shutdown() -> None:
    with balanced() as (client, _, _):
        client.shutdown()
        with pytest.raises(EngineDeadError, match="was shut down"):
            client.submit([request("a", fresh(1))])


ORDERS = st.lists(
    st.tuples(st.sampled_from(["submit", "submit", "abort", "step"]), st.integers(0, 7)), max_size=40
)


@given(ORDERS, st.integers(1, 4))
def test_no_replica_is_much_busier_than_another(orders: list[tuple[str, int]], count: int) -> None:
    """After any history: a new request of a fresh prompt goes to one that has the fewest sequences, about."""
    with balanced(count) as (client, replicas, _):
        asked: list[CoreRequest] = []
        for number, (order, value) in enumerate(orders):
            if order == "submit":
                asked.append(request(f"r{number}", fresh(value, value / 2) or [1], max_tokens=3))
                client.submit(asked[-1:])
            elif order == "abort" and asked:
                client.abort([asked[value % len(asked)].request_id])
            elif (replica := replicas[value % count]).num_unfinished:
                replica.step()
        waiting = [replica.num_unfinished for replica in replicas]
        home = send(client, replicas, "new", fresh(99, 1))
        assert waiting[home] <= min(waiting) + 3  # seven half pages are a fraction of a sequence
        client.abort([one.request_id for one in asked])
        assert [replica.num_unfinished for replica in replicas] == [i == home for i in range(count)]
