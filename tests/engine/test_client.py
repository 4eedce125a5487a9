"""The engine as a whole, on a tiny model: right tokens in any company, clean ends, contained failures."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.engine import core, settle
from jaxserve.engine.client import InProcessClient
from jaxserve.engine.lattice import BurstShape, Lattice, SampleShape, build_lattice
from jaxserve.engine.pace import MAX_BURST, Pace
from jaxserve.engine.protocol import CoreRequest, TokenOutput
from jaxserve.engine.runner import Runner
from jaxserve.errors import EngineDeadError, RecompileError
from tests.engine.tiny_engine import Collector, DenseModel, build_tiny, request
from tests.patience import PATIENCE

Engine = tuple[InProcessClient, Collector]


def run(engine: Engine, *requests: CoreRequest) -> list[list[int]]:
    client, collector = engine
    client.submit(requests)
    ids = [r.request_id for r in requests]
    collector.wait(*ids)
    assert collector.error is None
    return [collector.tokens(i) for i in ids]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100) for _ in range(rng.choice([1, 3, 8, 17, 40, 70]))] for _ in range(count)]


def test_greedy_tokens_are_those_of_a_dense_pass(engine: Engine, dense: DenseModel) -> None:
    wanted = [dense.greedy(prompt, 8) for prompt in prompts(9)]
    assert run(engine, *(request(f"g{i}", prompt) for i, prompt in enumerate(prompts(9)))) == wanted
    assert engine[0].stats().num_free_pages == engine[0].stats().num_pages


def mixed_requests() -> list[CoreRequest]:
    mixes: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.8, "seed": 6},
        {"temperature": 0.7, "min_p": 0.05, "seed": 7, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 8, "logit_bias": {3: 4.0, 5: -100.0}, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 9, "allowed_token_ids": (1, 2, 3, 50, 99)},
        {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 2},
    ]
    return [
        request(f"c{i}", prompt, **mixes[i % 7], max_tokens=20 - i % 3)
        for i, prompt in enumerate(prompts(14, seed=1))
    ]


def test_a_request_gives_the_same_tokens_alone_and_in_company(engine: Engine) -> None:
    requests = mixed_requests()
    together = run(engine, *requests)
    client, collector = engine
    for wanted, one in zip(together, requests, strict=True):
        collector.outputs.clear()
        assert client.reset_prefix_cache()
        assert run(engine, one) == [wanted]


def test_bursts_give_the_same_tokens_and_logprobs(
    engine: Engine, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hurried(Pace):
        def observe(self, num_steps: int, worked: float, waited: float, *, is_single: bool) -> None:
            self.steps = self.steps % 8 + 1

    monkeypatch.setattr(core, "Pace", Hurried)
    client, collector = build_tiny(cache_dir), Collector()
    client.start(collector.on_outputs, collector.on_dead)
    try:
        assert run((client, collector), *mixed_requests()) == run(engine, *mixed_requests())
        sizes = {len(output.token_ids) for outputs in collector.outputs.values() for output in outputs}
        assert max(sizes) > 1
        for request_id, outputs in collector.outputs.items():
            others = engine[1].outputs[request_id]
            found, wanted = (
                [score for o in some for score in o.logprobs or ()] for some in (outputs, others)
            )
            assert [(s.token_id, s.rank, s.top_ids) for s in found] == [
                (s.token_id, s.rank, s.top_ids) for s in wanted
            ]
            assert [s.logprob for s in found] == pytest.approx([s.logprob for s in wanted], abs=1e-5)
        assert client.stats().num_free_pages == client.stats().num_pages
    finally:
        client.shutdown()


def test_bursts_as_one_program_give_the_same_tokens(
    engine: Engine, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hurried(Pace):
        def observe(self, num_steps: int, worked: float, waited: float, *, is_single: bool) -> None:
            self.steps = MAX_BURST

    def with_bursts(**arguments: Any) -> Lattice:
        lattice = build_lattice(**arguments)
        drawing = SampleShape(lattice.max_num_seqs, "random", False)
        lattice = replace(lattice, samples=tuple({*lattice.samples, drawing}))
        bursts = [
            BurstShape(forward, lattice.sample(forward.num_tokens, variant, False))
            for forward in lattice.forwards
            if forward.kind == "decode"
            for variant in ("greedy", "random")
        ]
        return replace(lattice, bursts=tuple(bursts))

    called = []

    def call_burst(self: Runner, shape: BurstShape, *arguments: Any) -> jax.Array:
        called.append(shape.sample.variant)
        return original(self, shape, *arguments)

    original = Runner._call_burst
    monkeypatch.setattr(core, "Pace", Hurried)
    monkeypatch.setattr(settle, "build_lattice", with_bursts)
    client, collector = build_tiny(cache_dir), Collector()
    monkeypatch.setattr(Runner, "_call_burst", call_burst)
    client.start(collector.on_outputs, collector.on_dead)
    try:
        for kind, params in {"greedy": {}, "random": {"temperature": 0.9, "top_k": 9, "seed": 3}}.items():
            requests = [
                request(f"{kind}{i}", prompt, **params, max_tokens=30 - i)
                for i, prompt in enumerate(prompts(5, seed=3))
            ]
            assert run((client, collector), *requests) == run(engine, *requests)
            assert kind in called
        assert client.stats().num_free_pages == client.stats().num_pages
    finally:
        client.shutdown()


def test_preempted_requests_give_the_same_tokens(engine: Engine, cache_dir: str) -> None:
    requests = [
        request(f"p{i}", prompt[:20], temperature=0.8, seed=i, max_tokens=60, frequency_penalty=0.3)
        for i, prompt in enumerate(prompts(8, seed=2))
    ]
    wanted = run(engine, *requests)
    small, collector = (
        build_tiny(cache_dir, kv_cache_memory=17 * 2 * 8 * 2 * 2 * 8 * 4, max_model_len=100),
        Collector(),
    )
    small.start(collector.on_outputs, collector.on_dead)
    assert run((small, collector), *requests) == wanted
    assert small.stats().num_preemptions > 0
    assert small.stats().num_free_pages == small.stats().num_pages
    small.shutdown()


def test_logprobs_are_those_of_a_dense_pass(engine: Engine, dense: DenseModel) -> None:
    prompt = prompts(1, seed=4)[0] + [7] * 30
    (tokens,) = run(
        engine,
        request(
            "l",
            prompt,
            temperature=1.0,
            seed=1,
            logit_bias={7: 3.0},  # which log-probabilities do not know
            logprobs=3,
            prompt_logprobs=2,
            max_tokens=6,
        ),
    )
    table = dense.log_probs(prompt + tokens)
    outputs = engine[1].outputs["l"]
    items = [item for output in outputs for item in output.logprobs or ()]
    assert [item.token_id for item in items] == tokens
    for position, item in enumerate(items, start=len(prompt) - 1):
        row = table[position]
        assert item.logprob == pytest.approx(row[item.token_id], abs=1e-4)
        assert item.rank == 1 + int((row > row[item.token_id]).sum())
        assert item.top_ids == np.argsort(-row)[:3].tolist()
        assert item.top_logprobs == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)
    scores = outputs[0].prompt_logprobs
    assert scores is not None
    assert [score.token_id for score in scores] == prompt[1:]
    assert [score.logprob for score in scores] == pytest.approx(
        [table[i, token] for i, token in enumerate(prompt[1:])], abs=1e-4
    )
    assert all(len(score.top_ids) == 2 for score in scores)


def test_prompts_are_scored_among_others(engine: Engine, dense: DenseModel) -> None:
    """In chunks, beside decodes and plain prompts, and whatever the prefix cache knows of them."""
    texts = [prompt + [7] * (20 * i) for i, prompt in enumerate(prompts(4, seed=9))]
    plain = [request(f"plain{i}", prompt, max_tokens=12) for i, prompt in enumerate(texts)]
    wanted = run(engine, *plain)  # fills the prefix cache
    scored = [replace(one, request_id=f"scored{i}") for i, one in enumerate(plain)]
    scored = [replace(one, params=replace(one.params, prompt_logprobs=1)) for one in scored]
    again = [replace(one, request_id=f"again{i}") for i, one in enumerate(plain)]
    mixed = [request for pair in zip(scored, again, strict=True) for request in pair]
    assert run(engine, *mixed) == [tokens for tokens in wanted for _ in range(2)]
    assert wanted == [dense.greedy(prompt, 12) for prompt in texts]
    outputs = engine[1].outputs
    assert sum(outputs[f"again{i}"][0].num_cached_tokens for i in range(4)) > 0
    for index, prompt in enumerate(texts):
        scores = outputs[f"scored{index}"][0].prompt_logprobs
        assert scores is not None
        assert outputs[f"again{index}"][0].prompt_logprobs is None
        assert [score.token_id for score in scores] == prompt[1:]
        table = dense.log_probs(prompt)
        assert [score.logprob for score in scores] == pytest.approx(
            [table[i, token] for i, token in enumerate(prompt[1:])], abs=1e-4
        )


def test_masks_hold_token_by_token(engine: Engine) -> None:
    one = request("free", [5, 6], max_tokens=12, temperature=1.0, seed=4)
    (free,) = run(engine, one)
    banned_pair = (free[2], free[3])
    assert banned_pair not in list(itertools.pairwise(free[:3]))
    (tokens,) = run(engine, replace(one, request_id="pair", bad_word_ids=(banned_pair,)))
    assert tokens[:3] == free[:3]
    assert banned_pair not in list(itertools.pairwise(tokens))
    (tokens,) = run(engine, replace(one, request_id="single", bad_word_ids=((free[0],),)))
    assert free[0] not in tokens


@pytest.mark.parametrize(
    ("params", "bad_words", "num_told"),
    [
        ({"allowed_token_ids": (5,)}, ((5,),), 0),
        ({"allowed_token_ids": (5, 6)}, ((5,), (6, 6)), 1),
        ({"allowed_token_ids": (5,), "min_tokens": 3}, (), 0),
    ],
)
def test_a_request_that_allows_itself_no_token_fails_alone(
    engine: Engine, dense: DenseModel, params: dict[str, Any], bad_words: Any, num_told: int
) -> None:
    at_odds = replace(request("at odds", [1, 2], eos=(5,), **params), bad_word_ids=bad_words)
    client, collector = engine
    client.submit([request("fine", [5, 6, 7]), at_odds])
    collector.wait("fine", "at odds")
    last = collector.outputs["at odds"][-1]
    assert (last.finish_reason, last.error_param) == ("error", "allowed_token_ids")
    assert len(collector.tokens("at odds")) == num_told
    assert collector.tokens("fine") == dense.greedy([5, 6, 7], 8)
    assert client.stats().num_free_pages == client.stats().num_pages


def test_min_tokens_holds_back_the_end(engine: Engine) -> None:
    (free,) = run(engine, request("free", [9, 1], max_tokens=12))
    end = free[0]
    (short,) = run(engine, request("short", [9, 1], eos=(end,), max_tokens=12))
    assert short == [end]
    (long,) = run(engine, request("long", [9, 1], eos=(end,), max_tokens=12, min_tokens=5))
    assert end not in long[:5]
    assert len(long) > 5


def test_stop_tokens_and_limits_say_why(engine: Engine) -> None:
    (free,) = run(engine, request("free", [4], max_tokens=10))
    run(engine, request("stopped", [4], max_tokens=10, stop=(free[-1],)))
    last = engine[1].outputs["stopped"][-1]
    assert (last.finish_reason, last.stop_token_id) == ("stop", free[-1])
    assert engine[1].outputs["free"][-1].finish_reason == "length"
    (tokens,) = run(engine, request("context", [1] * 120, max_tokens=100))
    assert len(tokens) == 8
    assert engine[1].outputs["context"][-1].finish_reason == "length"


def test_an_aborted_request_says_nothing_more_and_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, collector = engine

    def aborting(batch: Sequence[TokenOutput]) -> None:
        """On the engine's own thread: for another one it could come to the end meanwhile."""
        collector.on_outputs(batch)
        if any(output.request_id == "gone" for output in batch):
            client.abort(["gone", "never seen"])

    monkeypatch.setattr(client, "_on_outputs", aborting)
    client.submit([request("gone", [1, 2, 3], max_tokens=120)])
    collector.wait_for_output("gone")
    run(engine, request("next", [1], max_tokens=3))
    said = len(collector.outputs["gone"])
    run(engine, request("after", [1], max_tokens=3))
    assert len(collector.outputs["gone"]) == said < 120
    assert client.stats().num_free_pages == client.stats().num_pages
    assert client.stats().num_running == client.stats().num_waiting == 0


def test_the_prefix_cache_can_be_forgotten_once_the_last_answer_has_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the device still computes for nobody."""
    client, collector = engine
    prompt = list(range(20))
    (free,) = run(engine, request("free", prompt))
    done = []

    def on_outputs(
        batch: Sequence[TokenOutput],
    ) -> None:  # between two steps, as the order would be carried out
        if batch[-1].finish_reason is not None:
            done.append(client._core.reset_prefix_cache())
        collector.on_outputs(batch)

    monkeypatch.setattr(client, "_on_outputs", on_outputs)
    run(engine, request("ended", prompt, eos=(free[1],)))
    assert run(engine, request("again", prompt)) == [free]
    assert done == [True, True]
    assert collector.outputs["again"][0].num_cached_tokens == 0


def test_an_impossible_request_fails_alone(engine: Engine) -> None:
    client, collector = engine
    broken = replace(request("broken", [1]), prompt_token_ids=[])
    client.submit([broken, request("fine", [1, 2])])
    collector.wait("broken", "fine")
    assert collector.outputs["broken"][-1].finish_reason == "error"
    assert len(collector.tokens("fine")) == 8
    # The sampler refuses a row without a seed: that is found when the sequence takes its slot.
    client.submit([request("seedless", [1], seed=None), request("also fine", [1, 2])])
    collector.wait("seedless", "also fine")
    assert "seed" in (collector.outputs["seedless"][-1].error or "")
    assert collector.tokens("also fine") == collector.tokens("fine")
    assert client.stats().num_free_pages == client.stats().num_pages


def test_a_request_that_fails_leaves_no_empty_pages_in_the_prefix_cache(
    engine: Engine, dense: DenseModel
) -> None:
    prompt = [(7 * i + 3) % 100 for i in range(40)]
    client, collector = engine
    client.submit([request("seedless", prompt, seed=None), request("beside", prompt)])
    collector.wait("seedless", "beside")
    assert collector.outputs["seedless"][-1].finish_reason == "error"
    assert collector.tokens("beside") == dense.greedy(prompt, 8)
    assert run(engine, request("behind", prompt)) == [dense.greedy(prompt, 8)]


def test_nothing_compiles_after_ready(engine: Engine) -> None:
    before = engine[0].stats().compiles_after_ready
    run(
        engine,
        *(request(f"v{i}", [i], temperature=float(i % 2), seed=i, top_p=0.9, logprobs=i) for i in range(6)),
    )
    assert engine[0].stats().compiles_after_ready == before == 0


@pytest.mark.parametrize("has_slow_calls", [False, True])
def test_an_engine_may_be_shut_down_by_a_thread_of_its_own(
    cache_dir: str, monkeypatch: pytest.MonkeyPatch, has_slow_calls: bool
) -> None:
    """As when the last that knows of an LLM is garbage, and is collected there."""
    client, collector = build_tiny(cache_dir), Collector()
    monkeypatch.setattr(client._core, "_has_slow_calls", has_slow_calls)
    honest = Runner.dispatch

    def dispatch(self: Runner, plan: Any) -> Any:
        client.shutdown()
        return honest(self, plan)

    monkeypatch.setattr(Runner, "dispatch", dispatch)
    client.start(collector.on_outputs, collector.on_dead)
    client.submit([request("a", [1])])
    assert client._thread is not None
    client._thread.join(PATIENCE)
    assert not client._thread.is_alive()
    assert collector.error is None
    client.shutdown()  # from here, so that what it froze is garbage again


class Panic(BaseException):
    """What a native library raises that has come to its wits' end: no Exception."""


class TestDeath:
    """What happens when a step fails on the device."""

    def start(self, cache_dir: str, **options: object) -> Engine:
        client, collector = build_tiny(cache_dir, **options), Collector()
        client.start(collector.on_outputs, collector.on_dead)
        return client, collector

    @pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, Panic])
    def test_everybody_is_told_at_once(
        self, cache_dir: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
    ) -> None:
        client, collector = self.start(cache_dir)

        def fail(*_: object) -> None:
            raise error("device lost")

        monkeypatch.setattr(Runner, "dispatch", fail)
        client.submit([request("a", [1]), request("b", [2])])
        collector.wait("a", "b")
        assert "device lost" in str(collector.error)
        with pytest.raises(EngineDeadError, match="device lost"):
            client.submit([request("c", [3])])
        client.shutdown()

    @pytest.mark.parametrize("forbid", [False, True])
    def test_a_compile_is_counted_and_on_request_refused(
        self, cache_dir: str, monkeypatch: pytest.MonkeyPatch, forbid: bool
    ) -> None:
        client, collector = self.start(cache_dir, forbid_recompile=forbid)
        honest = Runner.dispatch

        def compile_something(self: Runner, plan: object) -> object:
            jax.jit(lambda x: x * 3.25 + float(forbid))(np.ones(7, np.float32))
            return honest(self, plan)  # type: ignore[arg-type]  # passed through

        monkeypatch.setattr(Runner, "dispatch", compile_something)
        client.submit([request("a", [1])])
        collector.wait("a")
        assert client.stats().compiles_after_ready >= 1
        if forbid:
            assert isinstance(collector.error, RecompileError)
        else:
            assert len(collector.tokens("a")) == 8
        client.shutdown()
