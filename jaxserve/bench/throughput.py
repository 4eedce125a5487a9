"""`jaxserve bench throughput`: tokens per second at given batch sizes, beside transformers if asked."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxserve.bench.worker_process import WorkerProcess
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError

SETTLE_SECONDS = 0.3  # thread pools spin for a while after a run; the next engine should have the cores alone
WARM_UP_TOKENS = 16
_PEER_PACKAGES = ("torch", "transformers")
_PROBE = f"import importlib.util as u; print(*(n for n in {_PEER_PACKAGES} if u.find_spec(n) is None))"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputSpec:
    """What is run: `repeats` batches of each size, all prompts random token ids of one length."""

    batch_sizes: Sequence[int]
    input_len: int
    output_len: int
    repeats: int
    seed: int = 0


def jaxserve_worker(config: EngineConfig) -> WorkerProcess:
    """A worker with our engine."""
    return WorkerProcess("jaxserve", "jaxserve.bench.jaxserve_worker", [json.dumps(asdict(config))])


def transformers_worker(path: Path, dtype: str, python: str) -> WorkerProcess:
    """A worker with the peer; `python` has torch and transformers (see check_transformers)."""
    arguments = [str(path), dtype]
    return WorkerProcess("transformers", "jaxserve.bench.transformers_worker", arguments, python=python)


def check_transformers(python: str) -> None:
    """Raise ConfigError if `python` cannot run the peer, before anything is loaded for it."""
    try:
        probe = subprocess.run([python, "-c", _PROBE], check=False, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"--vs-python {python}: {error.strerror}") from error
    if probe.returncode:
        raise ConfigError(f"--vs-python {python}: is no Python ({probe.stderr.strip()[-200:]})")
    if missing := probe.stdout.split():
        raise ConfigError(
            f"--vs transformers: {python} lacks {', '.join(missing)}: make install EXTRAS=dev,parity, or name with "
            "--vs-python an interpreter that has them"
        )


def run_throughput(
    ours: WorkerProcess,
    make_peer: Callable[[str], WorkerProcess] | None,
    spec: ThroughputSpec,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Start the engines one after the other, run every batch on each, and return times and tokens per second.

    `make_peer` gets the dtype that our engine settled on.

    Within a repetition all engines get the same prompts; who comes first turns round from one to the next.
    No two repetitions share a prompt, so a prefix cache has nothing to find.
    """
    with ExitStack() as stack:
        say("loading the model into jaxserve …")
        workers = [stack.enter_context(ours)]
        if make_peer is not None:
            say("loading the model into the peer …")
            workers.append(stack.enter_context(make_peer(ours.description["dtype"])))
        vocab_size = ours.description["vocab_size"]
        batches = [_run_batch_size(workers, spec, size, vocab_size, say) for size in spec.batch_sizes]
    return {
        "input_len": spec.input_len,
        "output_len": spec.output_len,
        "repeats": spec.repeats,
        "engines": {worker.name: worker.description for worker in workers},
        "batches": batches,
    }


def _run_batch_size(
    workers: Sequence[WorkerProcess],
    spec: ThroughputSpec,
    batch_size: int,
    vocab_size: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    rng = random.Random(f"{spec.seed}/{batch_size}")

    def prompts() -> list[list[int]]:
        return [[rng.randrange(vocab_size) for _ in range(spec.input_len)] for _ in range(batch_size)]

    warm_up = prompts()
    for worker in workers:
        worker.run(warm_up, min(WARM_UP_TOKENS, spec.output_len))
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    agreement: list[float] = []
    for repeat in range(spec.repeats):
        batch = prompts()
        answers = []
        for worker in workers if repeat % 2 == 0 else reversed(workers):
            time.sleep(SETTLE_SECONDS)
            taken, token_ids = worker.run(batch, spec.output_len)
            seconds[worker.name].append(taken)
            answers.append(token_ids)
            rate = batch_size * spec.output_len / taken
            say(f"batch {batch_size}, run {repeat + 1}/{spec.repeats}, {worker.name}: {rate:.1f} tokens/s")
        if len(answers) == 2:
            agreement.append(_agreement(*answers))
    result: dict[str, Any] = {
        "batch_size": batch_size,
        "seconds": seconds,
        "tokens_per_second": {
            name: batch_size * spec.output_len / statistics.median(taken) for name, taken in seconds.items()
        },
    }
    if agreement:
        ours, peer = (statistics.median(seconds[worker.name]) for worker in workers)
        result["ratio"] = peer / ours
        # Random prompts have near ties, after which greedy answers part: this only shows like work.
        result["identical_prefix_share"] = statistics.mean(agreement)
    return result


def _agreement(ours: list[list[int]], peers: list[list[int]]) -> float:
    """Mean share of an answer before the two engines' first difference."""
    shares = []
    for a, b in zip(ours, peers, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        shares.append(same / len(a))
    return statistics.mean(shares)


def run_http(
    model: str,
    serve_flags: Sequence[str],
    concurrencies: Sequence[int],
    spec: ThroughputSpec,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Start the HTTP server on a free port and measure streamed chats at each concurrency."""
    from jaxserve.bench.serve_bench import LoadSpec, run_load
    from jaxserve.bench.server_process import ServerProcess

    results = []
    say("starting the HTTP server …")
    with ServerProcess(model, serve_flags) as server:
        for concurrency in concurrencies:
            load = LoadSpec(
                base_url=server.url,
                api="chat",
                num_prompts=concurrency * spec.repeats,
                input_len=spec.input_len,
                output_len=spec.output_len,
                max_concurrency=concurrency,
                seed=spec.seed + concurrency,  # prompts that no earlier run has left in the prefix cache
                show_progress=False,
            )
            metrics = run_load(load)
            say(f"HTTP, {concurrency} chats: {metrics['output_throughput']:.1f} tokens/s")
            results.append({"concurrency": concurrency, "startup_seconds": server.startup_seconds, **metrics})
    return results


def print_throughput(result: dict[str, Any]) -> None:
    """Print the tables of a throughput run."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    engines = list(result["engines"])
    table = Table(title=f"output tokens/s, {result['input_len']} in, {result['output_len']} out, greedy")
    for name in ("batch", *engines, *(["ratio", "same answer"] if len(engines) == 2 else [])):
        table.add_column(name, justify="right")
    for batch in result["batches"]:
        row = [str(batch["batch_size"]), *(f"{batch['tokens_per_second'][name]:.1f}" for name in engines)]
        if len(engines) == 2:
            row += [f"{batch['ratio']:.2f}x", f"{batch['identical_prefix_share']:.0%}"]
        table.add_row(*row)
    console.print(table)
    if result.get("http"):
        http = Table(title="HTTP server, streamed chats")
        for name in ("chats", "output tokens/s", "TTFT median ms", "TPOT median ms", "failed"):
            http.add_column(name, justify="right")
        for run in result["http"]:
            latencies = (
                f"{run[key]:.1f}" if key in run else "-" for key in ("median_ttft_ms", "median_tpot_ms")
            )
            http.add_row(
                str(run["concurrency"]), f"{run['output_throughput']:.1f}", *latencies, str(run["failed"])
            )
        console.print(http)
