"""From records to a table on the terminal and a JSON file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.bench.load_generator import RequestRecord
from jaxserve.bench.percentiles import REPORTED, Summary
from jaxserve.errors import ConfigError

_QUANTITIES = (
    ("ttft", "Time to first token"),
    ("tpot", "Time per output token"),
    ("itl", "Inter-token latency"),
    ("e2el", "End-to-end latency"),
)


def load_metrics(records: Sequence[RequestRecord], duration: float) -> dict[str, Any]:
    """Throughput and latencies of a load run of `duration` seconds, under the key names of vLLM's benchmark.

    Failed requests are counted by message, and only there: their tokens and times are in no other figure.
    """
    good = [record for record in records if record.error is None]
    failed = Counter(record.error for record in records if record.error is not None)
    input_tokens = sum(record.num_prompt_tokens for record in good)
    output_tokens = sum(record.num_output_tokens for record in good)
    metrics: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": failed.total(),
        "errors": dict(failed.most_common()),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
    }
    values = {
        "ttft": [t for record in good if (t := record.time_to_first_token) is not None],
        "tpot": [t for record in good if (t := record.time_per_output_token) is not None],
        "itl": [gap for record in good for gap in record.inter_token_latencies],
        "e2el": [record.latency for record in good],
    }
    for key, _ in _QUANTITIES:
        metrics |= _flat(key, Summary.of([1000 * value for value in values[key]]))
    return metrics


def print_load_report(title: str, metrics: dict[str, Any]) -> None:
    """Print the metrics of `load_metrics` as tables, errors last so that they are not overlooked."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("Requests completed / failed", f"{metrics['completed']} / {metrics['failed']}")
    table.add_row("Duration", f"{metrics['duration']:.2f} s")
    table.add_row(
        "Input / output tokens", f"{metrics['total_input_tokens']} / {metrics['total_output_tokens']}"
    )
    table.add_row("Requests per second", f"{metrics['request_throughput']:.2f}")
    table.add_row("Output tokens per second", f"{metrics['output_throughput']:.1f}")
    table.add_row("All tokens per second", f"{metrics['total_token_throughput']:.1f}")
    console.print(table)
    if metrics["completed"]:
        latencies = Table(title="milliseconds")
        latencies.add_column("")
        for name in ("mean", "median", *(f"p{p}" for p in REPORTED)):
            latencies.add_column(name, justify="right")
        for key, label in _QUANTITIES:
            if f"mean_{key}_ms" in metrics:
                names = ("mean", "median", *(f"p{p}" for p in REPORTED))
                latencies.add_row(label, *(f"{metrics[f'{name}_{key}_ms']:.2f}" for name in names))
        console.print(latencies)
    for message, count in metrics["errors"].items():
        console.print(f"[bold red]{count} failed:[/] {message}", highlight=False)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` to `path`, if there is one, making its folder."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error
    print(f"wrote {path}")


def _flat(key: str, summary: Summary | None) -> dict[str, float]:
    if summary is None:
        return {}
    flat = {f"mean_{key}_ms": summary.mean, f"median_{key}_ms": summary.median, f"std_{key}_ms": summary.std}
    return flat | {f"p{p}_{key}_ms": value for p, value in summary.percentiles.items()}
