"""The throughput comparison, with workers that have no model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jaxserve.bench.server_process import ServerProcess
from jaxserve.bench.throughput import ThroughputSpec, check_transformers, print_throughput, run_throughput
from jaxserve.bench.worker_process import WorkerProcess
from jaxserve.errors import ConfigError, JaxserveError

SPEC = ThroughputSpec(batch_sizes=[1, 3], input_len=5, output_len=8, repeats=3)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.bench.throughput.SETTLE_SECONDS", 0)


def worker(log: Path, name: str, mode: str = "works") -> WorkerProcess:
    return WorkerProcess(name, "tests.bench.counting_worker", [str(log), name, mode])


def test_turn_and_turn_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    dtypes: list[str] = []

    def make_peer(dtype: str) -> WorkerProcess:
        dtypes.append(dtype)
        return worker(log, "peer", "differs")

    said: list[str] = []
    result = run_throughput(worker(log, "ours"), make_peer, SPEC, said.append)
    assert dtypes == ["float32"]
    runs = [line.split(" ", 2) for line in log.read_text().splitlines()]
    # Both warm up, then the order turns round with every repetition.
    order = ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert [name for name, _, _ in runs] == order * 2
    # Both get the same prompts; nothing is asked twice.
    prompts = [text for _, _, text in runs]
    assert prompts[::2] == prompts[1::2]
    assert len(set(prompts)) == len(prompts) // 2
    assert {length for _, length, _ in runs} == {"8"}
    for batch in result["batches"]:
        ours, peer = (batch["tokens_per_second"][name] for name in ("ours", "peer"))
        assert batch["ratio"] == pytest.approx(ours / peer)
        assert batch["identical_prefix_share"] == 0.5
        assert len(batch["seconds"]["ours"]) == 3
    print_throughput(result)
    out = capsys.readouterr().out
    assert "ratio" in out
    assert "50%" in out
    assert len(said) == 2 + 2 * 2 * 3


def test_one_engine_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_throughput(worker(tmp_path / "log", "ours"), None, SPEC, lambda text: None)
    assert [batch["batch_size"] for batch in result["batches"]] == [1, 3]
    assert "ratio" not in result["batches"][0]
    print_throughput(result)
    assert "ratio" not in capsys.readouterr().out


def test_an_answer_of_the_wrong_length_is_no_fair_run(tmp_path: Path) -> None:
    with pytest.raises(JaxserveError, match=r"ours gave answers of \[7\] tokens for 8"):
        run_throughput(worker(tmp_path / "log", "ours", "short"), None, SPEC, lambda text: None)


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(JaxserveError, match="ours ended with status 3"):
        run_throughput(worker(tmp_path / "log", "ours", "dies"), None, SPEC, lambda text: None)


def test_a_python_without_torch_is_told_what_to_install(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    with pytest.raises(ConfigError, match=r"lacks torch, transformers: make install EXTRAS=dev,parity"):
        check_transformers(str(python))
    with pytest.raises(ConfigError, match=r"--vs-python /bin/false: is no Python"):
        check_transformers("/bin/false")
    with pytest.raises(ConfigError, match=r"--vs-python /nowhere/python: No such file"):
        check_transformers("/nowhere/python")


def test_a_server_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(JaxserveError, match=r"(?s)before it was ready:.*/nowhere/model"),
        ServerProcess("/nowhere/model"),
    ):
        pass
