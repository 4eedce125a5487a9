"""`jaxserve bench serve` from command line to JSON, against a scripted server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.cli.main import main
from tests.bench.fake_server import FakeServer


def run(server: FakeServer, *flags: str) -> int:
    return main(["bench", "serve", "--base-url", server.url, "--disable-tqdm", *flags])


def test_closed_loop(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    server.meeting = 2
    lengths = ("--random-input-len", "12", "--random-output-len", "9")
    flags = ("--num-prompts", "10", "--max-concurrency", "2", "--output", str(path))
    assert run(server, *lengths, *flags) == 0
    result = json.loads(path.read_text())
    assert (result["completed"], result["failed"]) == (10, 0)
    assert result["total_output_tokens"] == 90
    assert result["output_throughput"] == pytest.approx(90 / result["duration"])
    assert result["model"] == "fake"
    assert result["settings"]["max_concurrency"] == 2
    assert result["median_ttft_ms"] > 0
    assert len(server.bodies) == 11  # one to warm up
    for body in server.bodies:
        assert len(body["prompt"].split()) + 1 == 12  # as the server's /tokenize counts
        assert body["ignore_eos"] is True
        assert body["max_tokens"] == 9
    assert len({body["prompt"] for body in server.bodies}) == 11
    assert server.max_open == 2
    out = capsys.readouterr().out
    assert "Inter-token latency" in out
    assert f"wrote {path}" in out


def test_arrivals_of_a_dataset_as_chats(server: FakeServer, tmp_path: Path) -> None:
    dataset = tmp_path / "data.jsonl"
    dataset.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}], "max_tokens": 3}\n')
    flags = ("--endpoint", "chat", "--request-rate", "1000", "--num-prompts", "4", "--num-warmups", "0")
    assert run(server, *flags, "--dataset-path", str(dataset)) == 0
    contents = sorted(body["messages"][0]["content"] for body in server.bodies)
    assert contents == ["a", "a", "b", "b"]
    assert "ignore_eos" not in server.bodies[0]


def test_failures_are_counted_and_shown(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--random-input-len", "5", "--num-prompts", "3", "--num-warmups", "0", "--model", "breaks")
    assert run(server, *flags) == 1
    assert "3 failed: error in the stream: the engine died" in capsys.readouterr().out


def test_a_server_that_refuses_gets_no_load(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--random-input-len", "5", "--model", "refuses") == 1
    assert "no load was sent: 400: temperature" in capsys.readouterr().err
    assert len(server.bodies) == 1
