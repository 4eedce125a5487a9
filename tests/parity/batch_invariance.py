"""Show that an answer does not depend on who else is being answered.

    python tests/parity/batch_invariance.py [--model smollm2] [--requests 64] [--seed 0]

Requests of mixed lengths, half greedy and half seeded, run together in a KV cache too small for them, so that
prefixes are shared and sequences preempted.  Then each runs alone, with an empty prefix cache.  In float32
the tokens must be the same.  Exits with 0 if they are and prefixes were shared and sequences preempted, else
with 1.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prompts import PROMPTS

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.assembly import EngineParts, assemble
from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.protocol import EngineStats
from jaxserve.errors import JaxserveError
from jaxserve.loading.resolve import open_config
from jaxserve.text.tokenizer import Tokenizer

PAGE_SIZE = 16
NUM_PAGES = 96  # about a third of what max_num_seqs sequences of these lengths would like to have
MAX_MODEL_LEN = 512
MAX_NUM_SEQS = 32


@dataclass(frozen=True)
class Request:
    """One request, and what it is there to try."""

    kind: str
    prompt_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Outcome:
    """The tokens one request got in company and alone."""

    request: Request
    together: RequestOutput
    alone: RequestOutput

    @property
    def divergence(self) -> int | None:
        """The first answer position that differs; None when the answers are the same."""
        first, second = self.together.outputs[0], self.alone.outputs[0]
        if first.token_ids == second.token_ids and first.finish_reason == second.finish_reason:
            return None
        pairs = zip(first.token_ids, second.token_ids, strict=False)
        shorter = min(len(first.token_ids), len(second.token_ids))
        return next((i for i, (own, other) in enumerate(pairs) if own != other), shorter)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 invariant, 1 not, or what was to happen did not, 2 the check cannot be made."""
    parser = argparse.ArgumentParser(description="Compare answers of a full batch with answers given alone.")
    parser.add_argument("--model", default="smollm2", help="a GGUF file, directory or short name")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of requests")
    arguments = parser.parse_args(argv)
    if arguments.requests < 1:
        parser.error("--requests must be at least 1")
    try:
        model, _, _ = open_config(arguments.model)
        parts = assemble(
            EngineConfig(
                model=arguments.model,
                dtype="float32",
                page_size=PAGE_SIZE,
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=MAX_NUM_SEQS,
                kv_cache_memory=NUM_PAGES * page_bytes(model),
            )
        )
    except JaxserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    requests = build_requests(parts.tokenizer, arguments.requests, arguments.seed)
    outcomes, stats = run(parts, requests)
    return report(outcomes, stats)


def page_bytes(model: ModelConfig) -> int:
    """Bytes of one float32 KV page over all layers."""
    return model.num_layers * PAGE_SIZE * model.num_kv_heads * 2 * model.head_dim * 4


def build_requests(tokenizer: Tokenizer, count: int, seed: int) -> list[Request]:
    """Prompts of 1 to about 300 tokens, every other one seeded, every third penalised."""
    draw = random.Random(seed)
    plain = [tokenizer.encode(p.content, False) for p in PROMPTS if isinstance(p.content, str)]
    by_length = sorted(plain, key=len)
    prefixes = by_length[-3:]  # long enough for several full pages
    kinds: tuple[tuple[str, Callable[[int], list[int]]], ...] = (
        ("short", lambda i: by_length[i % (len(by_length) - 3)]),
        ("shared", lambda i: prefixes[i % len(prefixes)] + draw.choice(by_length[:-3])),
        (
            "part shared",
            lambda i: prefixes[i % 3][: draw.randint(40, len(prefixes[i % 3]))] + by_length[i % 20],
        ),
        ("noise", lambda _: [draw.randrange(100, 10_000) for _ in range(draw.randint(1, 300))]),
    )
    requests = []
    for i in range(count):
        kind, prompt = kinds[i // 2 % len(kinds)]
        requests.append(
            Request(kind, prompt(i), _params(draw, is_seeded=i % 2 == 1, is_penalised=i % 3 == 0))
        )
    return requests


def run(parts: EngineParts, requests: Sequence[Request]) -> tuple[list[Outcome], EngineStats]:
    """All requests at once, then one by one; the engine's counters are those of the first part."""
    with LLM.from_parts(parts) as llm:
        together = llm.generate([r.prompt_ids for r in requests], [r.params for r in requests])
        stats = parts.client.stats()
        alone = []
        for number, request in enumerate(requests, 1):
            if not parts.client.reset_prefix_cache():
                raise RuntimeError("pages are in use although nothing runs")
            alone += llm.generate([request.prompt_ids], request.params, use_tqdm=False)
            print(f"\ralone: {number}/{len(requests)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    outcomes = [Outcome(*trio) for trio in zip(requests, together, alone, strict=True)]
    return outcomes, stats


def report(outcomes: Sequence[Outcome], stats: EngineStats) -> int:
    """Print what happened; 0 if it is all as it should be."""
    print(f"\n{'prompt':<12}  {'sampling':<18}  requests  prompt tokens  from cache  answer tokens  same")
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.request.kind, _sampling(outcome.request.params)), []).append(outcome)
    for (kind, sampling), group in sorted(groups.items()):
        lengths = [len(outcome.request.prompt_ids) for outcome in group]
        cached = sum(outcome.together.num_cached_tokens for outcome in group)
        answered = sum(len(outcome.alone.outputs[0].token_ids) for outcome in group)
        same = sum(outcome.divergence is None for outcome in group)
        span = f"{min(lengths)}-{max(lengths)}"
        print(
            f"{kind:<12}  {sampling:<18}  {len(group):>8}  {span:>13}  {cached:>10}  {answered:>13}"
            f"  {same}/{len(group)}"
        )
    failures = [
        f"request {number} ({outcome.request.kind}, {_sampling(outcome.request.params)}): "
        f"differs from token {outcome.divergence} on"
        for number, outcome in enumerate(outcomes)
        if outcome.divergence is not None
    ]
    if stats.num_preemptions == 0:
        failures.append("no sequence was preempted: the KV cache was not small enough for these requests")
    if not any(outcome.together.num_cached_tokens for outcome in outcomes):
        failures.append("no prefix was found in the cache")
    if any(outcome.alone.num_cached_tokens for outcome in outcomes):
        failures.append("a request that ran alone found a prefix in the cache")
    print(
        f"\n{len(outcomes)} requests at once in {stats.num_pages} pages, {stats.num_steps} steps: "
        f"{stats.num_preemptions} preemptions, {stats.prefix_cache_hits} tokens from the prefix cache "
        "(preempted sequences' own included)"
    )
    for failure in failures:
        print(failure)
    print("FAIL" if failures else "PASS")
    return 1 if failures else 0


def _params(draw: random.Random, *, is_seeded: bool, is_penalised: bool) -> SamplingParams:
    return SamplingParams(
        temperature=0.8 if is_seeded else 0.0,
        top_p=0.95 if is_seeded else 1.0,
        top_k=40 if is_seeded else 0,
        seed=draw.getrandbits(32) if is_seeded else None,
        presence_penalty=0.5 if is_penalised else 0.0,
        frequency_penalty=0.3 if is_penalised else 0.0,
        repetition_penalty=1.1 if is_penalised else 1.0,
        max_tokens=draw.randint(16, 64),
        ignore_eos=draw.random() < 0.75,
    )


def _sampling(params: SamplingParams) -> str:
    name = "greedy" if params.is_greedy else "seeded"
    return f"{name}, penalised" if params.repetition_penalty != 1 else name


if __name__ == "__main__":
    sys.exit(main())
