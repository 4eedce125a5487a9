"""What each part measures, and the table that it prints."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.h100.engine import GREEDY, SAMPLED, Engine
from benchmarks.h100.models import title_of
from benchmarks.h100.peer import PEER, experts_in_use, floor_ms, peer_value
from benchmarks.h100.tables import print_table, ratio

PROMPT, OUTPUT, SHORT = 512, 128, 8  # tokens
PREFILL_BATCH, PREFILL_PROMPT = 32, 2048


@dataclass(frozen=True)
class Budget:
    """How often each run is repeated, and when to stop starting new ones."""

    repeats: int
    deadline: float  # of time.monotonic()

    @property
    def is_spent(self) -> bool:
        return time.monotonic() > self.deadline


def decode(
    engine: Engine, batches: Sequence[int], budget: Budget, say: Callable[[str], None]
) -> dict[str, Any]:
    """Decode step and end to end, each batch size: (wall at 128 tokens - wall at 8) / 120, medians."""
    results = []
    for batch in batches:
        measured = decode_step(engine, batch, budget, say)
        if measured is None:
            say(f"out of time before batch {batch}")
            break
        results.append(measured)
    print_decode(engine, results)
    print_end_to_end(engine, results)
    return {"batches": results}


def decode_step(
    engine: Engine,
    batch: int,
    budget: Budget,
    say: Callable[[str], None],
    sampling: dict[str, Any] = GREEDY,
) -> dict[str, Any] | None:
    """Times of one batch size; None if the budget was spent before a whole repetition."""
    if budget.is_spent:
        return None
    engine.run(batch, PROMPT, SHORT, sampling)  # the first run of a shape pays for what later ones find ready
    long: list[float] = []
    short: list[float] = []
    for repeat in range(budget.repeats):
        if long and budget.is_spent:
            say(f"out of time: {repeat} repetitions of {budget.repeats}")
            break
        long.append(engine.run(batch, PROMPT, OUTPUT, sampling))
        short.append(engine.run(batch, PROMPT, SHORT, sampling))
        step = 1000 * (long[-1] - short[-1]) / (OUTPUT - SHORT)
        say(f"batch {batch}: {long[-1]:.3f} s and {short[-1]:.3f} s, {step:.3f} ms a step")
    wall = statistics.median(long)
    return {
        "batch": batch,
        "prompt": PROMPT,
        "out": OUTPUT,
        "short": SHORT,
        "wall_all": long,
        "short_all": short,
        "decode_step_ms": 1000 * (wall - statistics.median(short)) / (OUTPUT - SHORT),
        "out_tok_s": batch * OUTPUT / wall,
    }


def end_to_end(
    engine: Engine, batches: Sequence[int], budget: Budget, say: Callable[[str], None]
) -> dict[str, Any]:
    """Output tokens a second from the first prompt to the last token, each batch size."""
    results = []
    for batch in batches:
        if budget.is_spent:
            say(f"out of time before batch {batch}")
            break
        engine.run(batch, PROMPT, SHORT)
        walls = [engine.run(batch, PROMPT, OUTPUT) for _ in range(budget.repeats)]
        wall = statistics.median(walls)
        results.append({"batch": batch, "wall_all": walls, "out_tok_s": batch * OUTPUT / wall})
        say(f"batch {batch}: {results[-1]['out_tok_s']:.0f} output tok/s")
    print_end_to_end(engine, results)
    return {"batches": results}


def prefill(engine: Engine, budget: Budget, say: Callable[[str], None]) -> dict[str, Any]:
    """Prompt tokens a second, 32 prompts of 2048 tokens and one token of answer."""
    engine.run(PREFILL_BATCH, PREFILL_PROMPT, 1)
    walls: list[float] = []
    while len(walls) < budget.repeats and not (walls and budget.is_spent):
        walls.append(engine.run(PREFILL_BATCH, PREFILL_PROMPT, 1))
        say(f"prefill: {walls[-1]:.3f} s")
    speed = PREFILL_BATCH * PREFILL_PROMPT / statistics.median(walls)
    model = engine.model
    print_table(
        f"prefill, {title_of(model)}, {PREFILL_BATCH} x {PREFILL_PROMPT} tokens, tok/s",
        ("", "jaxserve", PEER["engine"], "ratio", "aim", "GEMMs alone"),
        [
            (
                "prompt",
                speed,
                peer_value(model, "prefill_tok_s"),
                ratio(speed, peer_value(model, "prefill_tok_s")),
                peer_value(model, "prefill_aim_tok_s"),
                peer_value(model, "prefill_ceiling_tok_s"),
            )
        ],
    )
    return {"wall_all": walls, "prompt_tok_s": speed}


def sampling(engine: Engine, batch: int, budget: Budget, say: Callable[[str], None]) -> dict[str, Any] | None:
    """A decode step that samples against one that does not, same batch size."""
    greedy = decode_step(engine, batch, budget, say)
    sampled = decode_step(engine, batch, budget, say, SAMPLED)
    if greedy is None or sampled is None:
        say("out of time")
        return None
    share = sampled["decode_step_ms"] / greedy["decode_step_ms"]
    print_table(
        f"sampled decode step, {title_of(engine.model)}, batch {batch}: temperature 0.8, top_p 0.95, top_k 50",
        ("", "greedy ms", "sampled ms", "sampled/greedy", "at most"),
        [("", greedy["decode_step_ms"], sampled["decode_step_ms"], f"{share:.3f}", "1.05")],
    )
    return {"greedy": greedy, "sampled": sampled, "sampled_over_greedy": share}


def print_decode(engine: Engine, results: Sequence[dict[str, Any]]) -> None:
    """Decode steps beside the peer's, the floor and the aim; of models with experts, how many the floor counts."""
    model, experts = engine.model, engine.model_config.experts
    rows = []
    for result in results:
        batch, ours = result["batch"], result["decode_step_ms"]
        theirs = peer_value(model, "decode_ms", batch)
        floor = floor_ms(model, engine.model_config, batch, PROMPT + (OUTPUT + SHORT) // 2)
        rows.append(
            (
                str(batch),
                ours,
                theirs,
                ratio(theirs, ours),
                floor,
                ratio(ours, floor),
                peer_value(model, "aim_ms", batch),
                batch * 1000 / ours,
                *(() if experts is None else (experts_in_use(experts, batch),)),
            )
        )
    header = ("batch", "jaxserve", PEER["engine"], "faster", "floor", "of floor", "aim", "tok/s")
    if experts is not None:
        header += (f"experts of {experts.num_experts} read",)
    print_table(f"decode step, {title_of(model)}, ms", header, rows)


def print_end_to_end(engine: Engine, results: Sequence[dict[str, Any]]) -> None:
    """Offline throughput beside the peer's."""
    rows = []
    for result in results:
        theirs = peer_value(engine.model, "out_tok_s", result["batch"])
        rows.append(
            (str(result["batch"]), result["out_tok_s"], theirs, ratio(result["out_tok_s"], theirs), "1.05x")
        )
    header = ("batch", "jaxserve", PEER["engine"], "ratio", "at least")
    print_table(f"offline, {title_of(engine.model)}, {PROMPT} in, {OUTPUT} out, output tok/s", header, rows)
