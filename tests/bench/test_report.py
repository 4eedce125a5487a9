"""What a load run's records become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.bench.environment import environment
from jaxserve.bench.load_generator import RequestRecord
from jaxserve.bench.report import load_metrics, print_load_report, write_json
from jaxserve.errors import ConfigError


def record(*chunk_times: float, end: float, tokens: int, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        start=10.0,
        end=end,
        chunk_times=list(chunk_times),
        num_prompt_tokens=100,
        num_output_tokens=tokens,
        error=error,
    )


def test_metrics() -> None:
    records = [
        record(10.5, 10.6, 10.8, end=10.8, tokens=4),
        record(11.0, end=11.0, tokens=1),
        record(end=10.1, tokens=0, error="400: no"),
        record(10.2, end=10.4, tokens=3, error="cut"),
        record(end=10.1, tokens=0, error="400: no"),
    ]
    metrics = load_metrics(records, duration=2.0)
    assert (metrics["completed"], metrics["failed"]) == (2, 3)
    assert metrics["errors"] == {"400: no": 2, "cut": 1}
    assert metrics["total_input_tokens"] == 200
    assert metrics["total_output_tokens"] == 5
    assert metrics["output_throughput"] == 2.5
    assert metrics["total_token_throughput"] == 102.5
    assert metrics["request_throughput"] == 1.0
    assert metrics["mean_ttft_ms"] == pytest.approx(750)
    assert metrics["mean_tpot_ms"] == pytest.approx(100)  # (10.8 - 10.5) / 3; one token has no time per token
    assert metrics["median_itl_ms"] == pytest.approx(150)
    assert metrics["mean_e2el_ms"] == pytest.approx(900)
    assert metrics["p99_e2el_ms"] == pytest.approx(998)


def test_the_table_shows_errors(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = load_metrics(
        [record(10.5, 10.6, end=10.6, tokens=2), record(end=10, tokens=0, error="400: no")], 1
    )
    print_load_report("a run", metrics)
    out = capsys.readouterr().out
    assert "1 / 1" in out
    assert "Time to first token" in out
    assert "1 failed: 400: no" in out


def test_a_run_without_success_has_no_latencies(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = load_metrics([record(end=10, tokens=0, error="down")], 1)
    print_load_report("a run", metrics)
    assert "Time to first token" not in capsys.readouterr().out
    assert "mean_ttft_ms" not in metrics


def test_json_says_where_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "results" / "run.json"
    write_json(path, environment(benchmark="serve", completed=3))
    result = json.loads(path.read_text())
    assert result["completed"] == 3
    assert result["benchmark"] == "serve"
    assert result["versions"]["jaxserve"]
    assert result["machine"]["num_cpus"] >= 1
    assert result["date"].endswith("+00:00")


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--output"):
        write_json(tmp_path, {})
