"""`jaxserve bench latency`: how long one batch takes from prompts to last token."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jaxserve.bench.percentiles import Summary

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.llm import LLM


def run_latency(
    config: EngineConfig,
    *,
    batch_size: int,
    input_len: int,
    output_len: int,
    iterations: int,
    warmup_iterations: int,
    seed: int = 0,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Time `iterations` greedy batches, each of new random prompts: the prefix cache finds nothing.

    A decode step is (whole batch - batch of one token each) / (output_len - 1).
    """
    from jaxserve.assembly import assemble
    from jaxserve.llm import LLM

    start = time.perf_counter()
    llm = LLM.from_parts(assemble(config), seed=config.seed)
    startup = time.perf_counter() - start
    rng = random.Random(seed)
    try:
        for _ in range(warmup_iterations):
            _time_batch(llm, rng, batch_size, input_len, output_len)
        first = [_time_batch(llm, rng, batch_size, input_len, 1) for _ in range(min(iterations, 3))]
        whole = []
        for i in range(iterations):
            whole.append(_time_batch(llm, rng, batch_size, input_len, output_len))
            say(f"iteration {i + 1}/{iterations}: {whole[-1]:.3f} s")
        engine = asdict(llm.info)
    finally:
        llm.shutdown()
    summary = Summary.of(whole)
    assert summary is not None
    prefill = statistics.median(first)
    result = {
        "engine": engine,
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "startup_seconds": startup,
        "latencies": whole,
        "mean_latency": summary.mean,
        "median_latency": summary.median,
        **{f"p{p}_latency": value for p, value in summary.percentiles.items()},
        "one_token_latency": prefill,
        "output_tokens_per_second": batch_size * output_len / summary.median,
    }
    if output_len > 1:
        result["decode_step_ms"] = 1000 * (summary.median - prefill) / (output_len - 1)
    return result


def print_latency(result: dict[str, Any]) -> None:
    """Print the table of a latency run."""
    from rich.console import Console
    from rich.table import Table

    title = f"batch {result['batch_size']}, {result['input_len']} in, {result['output_len']} out"
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("mean", "median", "p90", "p99"):
        table.add_row(f"Latency, {name}", f"{result[f'{name}_latency']:.3f} s")
    table.add_row("First token (prefill)", f"{result['one_token_latency']:.3f} s")
    if "decode_step_ms" in result:
        table.add_row("Decode step", f"{result['decode_step_ms']:.2f} ms")
    table.add_row("Output tokens per second", f"{result['output_tokens_per_second']:.1f}")
    table.add_row("Start-up", f"{result['startup_seconds']:.1f} s")
    Console().print(table)


def _time_batch(llm: LLM, rng: random.Random, batch_size: int, input_len: int, output_len: int) -> float:
    from jaxserve.inputs import TokensPrompt
    from jaxserve.sampling_params import SamplingParams

    vocab_size = llm.info.vocab_size
    prompts = [
        TokensPrompt(prompt_token_ids=[rng.randrange(vocab_size) for _ in range(input_len)])
        for _ in range(batch_size)
    ]
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start
