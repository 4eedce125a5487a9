"""The scheduler on a simulated device, against generating every request alone."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from jaxserve.engine.pages import PageAllocator
from jaxserve.engine.plan import StepPlan, StepResult
from jaxserve.engine.protocol import CoreRequest, TokenLogprobs, TokenOutput
from jaxserve.engine.scheduler import Scheduler
from jaxserve.sampling_params import SamplingParams
from tests.engine.simulated_device import VOCAB_SIZE, SimulatedDevice, generate_alone

PAGE_SIZE = 4
MAX_LEN = 64


def make_request(
    request_id: str,
    prompt: list[int],
    *,
    max_tokens: int = 8,
    eos: tuple[int, ...] = (),
    priority: int = 0,
    arrival: float = 0.0,
    salt: str | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
    stop: tuple[int, ...] = (),
    **params: object,
) -> CoreRequest:
    return CoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, seed=0, **params),  # type: ignore[arg-type]  # by name
        eos_token_ids=eos,
        stop_token_ids=stop,
        bad_word_ids=bad_words,
        priority=priority,
        arrival_time=arrival,
        cache_salt=salt,
    )


@dataclass
class Rig:
    """Scheduler and device with up to `depth` steps in flight."""

    num_pages: int = 65
    max_num_seqs: int = 4
    budget: int = 16
    scoring_budget: int = 16
    depth: int = 2
    prefix_caching: bool = True
    chunk_rows: int = 0
    max_model_len: int = MAX_LEN
    outputs: dict[str, list[TokenOutput]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.allocator = PageAllocator(self.num_pages, enable_prefix_caching=self.prefix_caching)
        self.scheduler = Scheduler(
            self.allocator,
            page_size=PAGE_SIZE,
            max_num_seqs=self.max_num_seqs,
            token_budget=self.budget,
            scoring_budget=self.scoring_budget,
            max_model_len=self.max_model_len,
            chunk_rows=self.chunk_rows,
        )
        self.device = SimulatedDevice(PAGE_SIZE)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    def step(self, burst_steps: int = 1) -> StepPlan | None:
        self.scheduler.burst_steps = burst_steps
        plan = self.scheduler.schedule()
        if plan is not None:
            assert plan.num_tokens <= (self.scoring_budget if plan.scores_prompts else self.budget)
            assert len(plan.entries) <= self.max_num_seqs
            self.in_flight.append((plan, self.device.run(plan)))
        if self.in_flight and (plan is None or len(self.in_flight) >= self.depth):
            for output in self.scheduler.commit(*self.in_flight.popleft()):
                self.outputs.setdefault(output.request_id, []).append(output)
        return plan

    @property
    def is_busy(self) -> bool:
        return bool(self.in_flight) or self.scheduler.num_running + self.scheduler.num_waiting > 0

    def run(self, limit: int = 5000, burst_steps: Callable[[], int] = lambda: 1) -> None:
        for _ in range(limit):
            if not self.is_busy:
                assert self.allocator.num_free == self.allocator.num_pages
                assert len(self.scheduler._waiting) == self.scheduler._num_dropped
                return
            self.step(burst_steps())
        raise AssertionError("no progress")

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, []) for token in output.token_ids]


@pytest.mark.parametrize("seed", range(60))
def test_any_load_gives_what_each_request_gives_alone(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig(
        num_pages=rng.choice([17, 20, 33, 65]),
        max_num_seqs=rng.randint(1, 6),
        budget=rng.choice([8, 16, 64]),
        scoring_budget=rng.choice([6, 8, 16]),
        depth=rng.randint(1, 3),
        prefix_caching=rng.random() < 0.8,
        chunk_rows=seed % 3 * 4,
    )
    longest_burst = rng.choice([1, 1, 3, 8])

    def burst_steps() -> int:
        return rng.randint(1, longest_burst)

    shared = [rng.randrange(VOCAB_SIZE) for _ in range(24)]
    requests: dict[str, CoreRequest] = {}
    aborted: set[str] = set()
    for index in range(25):
        prompt = shared[: rng.randint(0, 24)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))]
        eos = (rng.randrange(VOCAB_SIZE),) if rng.random() < 0.7 else ()
        stop = (rng.randrange(VOCAB_SIZE),) if rng.random() < 0.3 else ()
        request = make_request(
            f"r{index}",
            prompt,
            max_tokens=rng.randint(1, 40),
            eos=eos,
            priority=rng.choice([0, 0, 0, 1, -1]),
            arrival=float(index),
            salt=rng.choice([None, None, "a"]),
            stop=stop,
            bad_words=((1, 2, 3),) if rng.random() < 0.2 else (),
            prompt_logprobs=0 if rng.random() < 0.2 else None,
        )
        requests[request.request_id] = request
        rig.scheduler.add(request)
        for _ in range(rng.randint(0, 4)):
            rig.step(burst_steps())
        if rng.random() < 0.2:
            victim = rng.choice(list(requests))
            if rig.scheduler.abort(victim):
                aborted.add(victim)
    rig.run(burst_steps=burst_steps)
    for request_id, request in requests.items():
        expected = generate_alone(
            request.prompt_token_ids,
            request.params.max_tokens or 0,
            request.eos_token_ids,
            request.stop_token_ids,
            MAX_LEN,
        )
        tokens = rig.tokens(request_id)
        if request_id in aborted:
            assert tokens == expected[: len(tokens)]
            continue
        assert tokens == expected
        reasons = [output.finish_reason for output in rig.outputs[request_id]]
        assert set(reasons[:-1]) <= {None}
        ended_by_token = expected[-1] in (*request.eos_token_ids, *request.stop_token_ids)
        assert reasons[-1] == ("stop" if ended_by_token else "length")
        if request.params.prompt_logprobs is not None:
            scores = rig.outputs[request_id][0].prompt_logprobs
            assert scores is not None
            assert [score.token_id for score in scores] == request.prompt_token_ids[1:]
            assert [score.logprob for score in scores] == [float(i) for i in range(len(scores))]


def test_small_caches_preempt_and_still_answer() -> None:
    rig = Rig(num_pages=18, max_num_seqs=4, budget=64)
    for index in range(4):
        rig.scheduler.add(make_request(f"r{index}", [index] * 6, max_tokens=40, arrival=float(index)))
    rig.run()
    assert rig.scheduler.counters.num_preemptions > 0
    for index in range(4):
        assert rig.tokens(f"r{index}") == generate_alone([index] * 6, 40, (), (), MAX_LEN)


def test_a_prefix_is_computed_once_even_within_one_step() -> None:
    rig = Rig(budget=64)
    prompt = list(range(17))
    rig.scheduler.add(make_request("a", prompt))
    rig.scheduler.add(make_request("b", prompt))
    plan = rig.step()
    assert plan is not None
    assert [len(entry.token_ids) for entry in plan.entries] == [1, 17]
    rig.run()
    assert rig.tokens("a") == rig.tokens("b")
    assert [rig.outputs[name][0].num_cached_tokens for name in "ab"] == [0, 16]
    assert (rig.scheduler.counters.prefix_cache_queries, rig.scheduler.counters.prefix_cache_hits) == (34, 16)


def test_a_page_whose_last_token_runs_alone_is_not_found_in_that_step() -> None:
    """A decode kernel writes and reads in one launch: no row of it may look at what another one writes."""
    rig = Rig(budget=7)
    prompt = list(range(8))
    rig.scheduler.add(make_request("a", prompt, max_tokens=4))
    rig.step()
    rig.scheduler.add(make_request("b", [*prompt, 9], max_tokens=4, arrival=1.0))
    plan = rig.step()
    assert plan is not None
    assert [len(entry.token_ids) for entry in plan.entries] == [1, 5]
    rig.run()
    assert rig.tokens("a") == generate_alone(prompt, 4, (), (), MAX_LEN)
    assert rig.tokens("b") == generate_alone([*prompt, 9], 4, (), (), MAX_LEN)


def test_newcomers_take_no_pages_that_a_running_prompt_waits_for() -> None:
    rig = Rig(num_pages=17, max_num_seqs=6, budget=32)
    sizes = [9] * 6 + [60] + [9] * 100
    for index, size in enumerate(sizes):
        max_tokens = 1 if size == 60 else 6 + index % 3
        rig.scheduler.add(
            make_request(f"r{index}", [index % 50] * size, max_tokens=max_tokens, arrival=float(index))
        )
    rig.run()
    assert list(rig.outputs).index("r6") < 10
    assert rig.tokens("r6") == generate_alone([6] * 60, 1, (), (), MAX_LEN)


def test_the_last_prompt_token_always_runs() -> None:
    rig = Rig()
    for name in "ab":
        rig.scheduler.add(make_request(name, list(range(8)), max_tokens=1))
        rig.run()
    assert rig.outputs["b"][0].num_cached_tokens == 4
    assert rig.tokens("a") == rig.tokens("b")


def test_answers_are_cached_too() -> None:
    rig = Rig()
    rig.scheduler.add(make_request("a", list(range(6)), max_tokens=7))
    rig.run()
    follow_up = list(range(6)) + rig.tokens("a") + [9]
    rig.scheduler.add(make_request("b", follow_up, max_tokens=2))
    rig.run()
    assert rig.outputs["b"][0].num_cached_tokens == 12
    assert rig.tokens("b") == generate_alone(follow_up, 2, (), (), MAX_LEN)


def test_salts_share_nothing() -> None:
    rig = Rig()
    for name, salt in (("a", None), ("b", "s"), ("c", "s")):
        rig.scheduler.add(make_request(name, list(range(9)), salt=salt))
        rig.run()
    assert [rig.outputs[name][0].num_cached_tokens for name in "abc"] == [0, 0, 8]


def test_decodes_go_on_while_a_long_prompt_is_read_in_chunks() -> None:
    rig = Rig(budget=8, depth=1)
    rig.scheduler.add(make_request("short", [1], max_tokens=30))
    rig.step()
    rig.scheduler.add(make_request("long", list(range(30)), max_tokens=2, arrival=1.0))
    counts = []
    while "long" not in rig.outputs:
        plan = rig.step()
        assert plan is not None
        counts.append([len(entry.token_ids) for entry in plan.entries])
    assert counts == [[1, 7], [1, 7], [1, 7], [1, 7], [1, 2]]


class Forcing:
    """A grammar that forces a text; who follows it is told by `commit`."""

    ends_itself = False

    def take_forced(self, least: int, most: int) -> list[int]:
        return []


@pytest.mark.parametrize(("chunk_rows", "counts"), [(0, [7]), (4, [3, 3, 1]), (1, [7])])
def test_forced_tokens_hold_nobody_up(chunk_rows: int, counts: list[int]) -> None:
    """They take the rows that a decode step has to spare beside others, and all at once where it has none."""
    rig = Rig(chunk_rows=chunk_rows, depth=1)
    rig.scheduler.add(make_request("other", [1, 2], max_tokens=30))
    rig.step()
    rig.scheduler.add(make_request("forced", [3, 4, 5], max_tokens=30), Forcing())  # type: ignore[arg-type]  # by shape
    plan = rig.scheduler.schedule()
    assert plan is not None
    assert [len(entry.token_ids) for entry in plan.entries] == [1, 3], "prompts are read whole"
    rig.scheduler.commit(plan, rig.device.run(plan), {1: [6, 7, 8, 9, 10, 11]})
    taken = []
    while not taken or not plan.entries[-1].samples:
        plan = rig.scheduler.schedule()
        assert plan is not None
        rig.scheduler.commit(plan, rig.device.run(plan))
        taken.append(len(plan.entries[-1].token_ids))
    assert taken == counts


def test_forced_tokens_are_no_cached_prompt() -> None:
    class Spelling(Forcing):
        is_complete = False

        def take_forced(self, least: int, most: int) -> list[int]:
            return list(range(12)) if most else []

    rig = Rig(depth=1)
    for name in "ab":
        rig.scheduler.add(make_request(name, [3, 4, 5, 6, 7], max_tokens=20), Spelling())  # type: ignore[arg-type]  # by shape
        rig.run()
    assert rig.tokens("a") == rig.tokens("b")
    assert [rig.outputs[name][0].num_cached_tokens for name in "ab"] == [0, 5]


def test_priority_goes_before_arrival() -> None:
    rig = Rig(max_num_seqs=1, depth=1)
    rig.scheduler.add(make_request("late", [1], max_tokens=1, priority=1, arrival=0.0))
    rig.scheduler.add(make_request("soon", [2], max_tokens=1, priority=0, arrival=1.0))
    rig.run()
    assert list(rig.outputs) == ["soon", "late"]


def test_a_burst_ends_with_the_longest_of_its_sequences() -> None:
    rig = Rig(depth=1)
    rig.scheduler.add(make_request("a", [1, 2], max_tokens=4))
    rig.scheduler.add(make_request("b", [3, 4], max_tokens=30))
    rig.step(burst_steps=8)
    plan = rig.step(burst_steps=8)
    assert plan is not None
    assert [entry.num_steps for entry in plan.entries] == [3, 8]
    assert plan.num_steps == 8
    assert [len(output.token_ids) for output in rig.outputs["b"]] == [1, 8]
    rig.run()
    assert rig.tokens("a") == generate_alone([1, 2], 4, (), (), MAX_LEN)


def test_a_burst_takes_pages_that_are_free_and_nobody_elses() -> None:
    rig = Rig(num_pages=18, max_num_seqs=4, budget=64, depth=1)
    for index in range(4):
        rig.scheduler.add(make_request(f"r{index}", [index] * 6, max_tokens=40, arrival=float(index)))
    num_steps = 8
    while num_steps == 8:  # until pages are short
        plan = rig.step(burst_steps=8)
        assert plan is not None
        num_steps = plan.num_steps if len(plan.entries) == 4 and not plan.admissions else 8
    assert rig.scheduler.counters.num_preemptions == 0
    rig.run(burst_steps=lambda: 8)
    for index in range(4):
        assert rig.tokens(f"r{index}") == generate_alone([index] * 6, 40, (), (), MAX_LEN)


@pytest.mark.parametrize("params", [{"min_tokens": 5}, {"bad_words": ((1, 2),)}])
def test_no_burst_where_the_host_must_see_the_tokens(params: dict[str, Any]) -> None:
    rig = Rig(depth=1)
    rig.scheduler.add(make_request("a", [1, 2], max_tokens=8, **params))
    rig.step(burst_steps=8)
    plan = rig.step(burst_steps=8)
    assert plan is not None
    assert plan.num_steps == 1


def test_no_burst_goes_on_while_somebody_waits_for_the_host_to_see_a_token() -> None:
    rig = Rig()
    rig.scheduler.add(make_request("plain", [1, 2], max_tokens=60))
    rig.scheduler.add(make_request("seen", [3, 4], max_tokens=8, bad_words=((1, 2),)))
    while "seen" not in rig.outputs or len(rig.tokens("seen")) < 8:
        rig.step(burst_steps=8)
    # Every other step: its token comes back, and is the input of the next.
    assert len(rig.tokens("plain")) <= 2 * 8


def test_no_step_is_spent_on_a_sequence_that_is_certainly_done() -> None:
    rig = Rig()
    rig.scheduler.add(make_request("a", [1, 2], max_tokens=3))
    rig.run()
    assert rig.scheduler.counters.num_steps == 3


def test_an_aborted_request_frees_its_pages_at_once() -> None:
    rig = Rig()
    rig.scheduler.add(make_request("a", list(range(20)), max_tokens=30))
    rig.step()
    rig.step()
    assert rig.allocator.num_free < rig.allocator.num_pages
    assert rig.scheduler.abort("a")
    assert rig.allocator.num_free == rig.allocator.num_pages
    assert not rig.scheduler.abort("a")
    rig.run()


def test_a_reused_request_id_does_not_get_the_old_ones_tokens() -> None:
    rig = Rig()
    rig.scheduler.add(make_request("a", [1, 2, 3], max_tokens=30))
    rig.step()
    rig.scheduler.abort("a")
    rig.scheduler.add(make_request("a", [4, 5], max_tokens=4))
    rig.run()
    assert rig.tokens("a") == generate_alone([4, 5], 4, (), (), MAX_LEN)


def test_aborted_requests_do_not_pile_up_in_the_queue() -> None:
    rig = Rig(max_num_seqs=1, budget=64)
    rig.scheduler.add(make_request("runs", [1], max_tokens=60))
    rig.step()
    for index in range(5000):
        rig.scheduler.add(make_request(f"r{index}", [2] * 20, arrival=float(index)))
        rig.scheduler.abort(f"r{index}")
    assert rig.scheduler.num_waiting == 0
    assert len(rig.scheduler._waiting) < 200
    rig.run()


def test_answers_that_wait_share_their_prompt() -> None:
    rig = Rig(max_model_len=10_000)
    prompt = [7] * 8_000
    tracemalloc.start()
    try:
        for index in range(100):
            rig.scheduler.add(make_request(f"r{index}", prompt))
        rig.step()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 10 * 8 * len(prompt), "ten copies, not a hundred"


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_is_in_order_whatever_is_aborted(seed: int) -> None:
    """Against a plain sorted list: requests of one token run one a step, in the order of the queue."""
    rng = random.Random(seed)
    rig = Rig(max_num_seqs=1, budget=64, depth=1)
    waiting: list[tuple[int, float, int, str]] = []  # priority, arrival, number, id: who goes first
    expected: list[str] = []
    for number in range(1500):
        action = rng.random()
        if action < 0.55:
            request = make_request(
                f"r{number}", [3], max_tokens=1, priority=rng.randint(-1, 1), arrival=float(rng.randint(0, 9))
            )
            rig.scheduler.add(request)
            waiting.append((request.priority, request.arrival_time, number, request.request_id))
        elif action < 0.95 and waiting:
            gone = waiting.pop(rng.randrange(len(waiting)))
            assert rig.scheduler.abort(gone[-1])
        elif waiting:
            waiting.sort()
            expected.append(waiting.pop(0)[-1])
            rig.step()
        assert rig.scheduler.num_waiting == len(waiting)
        assert 0 <= rig.scheduler._num_dropped <= len(rig.scheduler._waiting)
        assert len(rig.scheduler._waiting) <= 2 * len(waiting) + 130
    expected += [entry[-1] for entry in sorted(waiting)]
    rig.run()
    assert list(rig.outputs) == expected


def test_outputs_tell_when_they_were_scheduled_and_when_they_came() -> None:
    rig = Rig(max_num_seqs=1, num_pages=18)
    start = time.monotonic()
    for name in "ab":
        rig.scheduler.add(make_request(name, [1, 2], max_tokens=3))
    rig.run()
    end = time.monotonic()
    a, b = rig.outputs["a"], rig.outputs["b"]
    assert {output.scheduled_time for output in a} == {a[0].scheduled_time}
    assert start <= a[0].scheduled_time <= a[0].time <= a[1].time <= a[2].time <= end
    assert a[-1].time <= b[0].scheduled_time <= b[0].time


def test_a_preempted_sequence_was_scheduled_when_it_first_ran() -> None:
    rig = Rig(num_pages=18, max_num_seqs=4, budget=64)
    for index in range(4):
        rig.scheduler.add(make_request(f"r{index}", [index] * 6, max_tokens=40, arrival=float(index)))
    rig.run()
    assert rig.scheduler.counters.num_preemptions > 0
    for outputs in rig.outputs.values():
        assert len({output.scheduled_time for output in outputs}) == 1
        assert outputs[0].scheduled_time <= outputs[0].time


def test_min_tokens_keeps_the_end_token_from_ending() -> None:
    rig = Rig()
    expected = generate_alone([3], 20, (), (), MAX_LEN)
    rig.scheduler.add(make_request("a", [3], max_tokens=20, eos=(expected[2],), min_tokens=3))
    rig.run()
    # The simulated device knows no masks: it may sample the end token early, and the scheduler must not stop there.
    assert rig.tokens("a")[:4] == expected[:4]


def test_prompt_logprobs_type_is_what_the_protocol_says() -> None:
    rig = Rig(budget=6)
    rig.scheduler.add(make_request("a", list(range(15)), prompt_logprobs=1))
    rig.run()
    scores = rig.outputs["a"][0].prompt_logprobs
    assert scores is not None
    assert all(isinstance(score, TokenLogprobs) for score in scores)
    assert all(output.prompt_logprobs is None for output in rig.outputs["a"][1:])


def test_only_steps_that_score_a_prompt_keep_to_its_budget() -> None:
    rig = Rig(budget=48, scoring_budget=8)
    rig.scheduler.add(make_request("plain", [1] * 60, max_tokens=1))
    assert (plan := rig.step()) is not None
    assert plan.num_tokens == 48
    rig.scheduler.add(make_request("scored", [2] * 20, max_tokens=2, prompt_logprobs=0, arrival=1.0))
    rig.scheduler.add(make_request("behind", [3] * 40, max_tokens=1, arrival=2.0))
    sizes = []
    while rig.is_busy:
        if (plan := rig.step()) is not None:
            sizes.append((plan.num_tokens, plan.scores_prompts))
    # 12 tokens of "plain" are more than a scoring step has, so "scored" waits for them, and "behind" for its end.
    assert sizes[:4] == [(12, False), (8, True), (8, True), (8, True)]
    assert all(not scores for _, scores in sizes[4:])
    assert max(count for count, _ in sizes[4:]) > 8
    scores = rig.outputs["scored"][0].prompt_logprobs
    assert scores is not None
    assert [score.logprob for score in scores] == [float(i) for i in range(19)]
