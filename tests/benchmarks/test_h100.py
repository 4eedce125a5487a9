"""The H100 tables' arithmetic, figures and results file, on an engine that only keeps time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.h100 import results
from benchmarks.h100.models import HF_CONFIGS, write_model
from benchmarks.h100.parts import Budget, decode, prefill, sampling
from benchmarks.h100.peer import PEER, floor_ms, kv_bytes, weight_bytes
from benchmarks.h100.plot import decode_series
from jaxserve.loading.hf_config import model_config_from_hf
from jaxserve.loading.resolve import open_config
from jaxserve.text.tokenizer import load_tokenizer


class PretendEngine:
    """Runs take 1 ms a sequence to prefill and `step` a token, by its own clock; sampling takes a tenth more."""

    def __init__(self, model: str, step: float) -> None:
        self.model = model
        self.model_config = model_config_from_hf(HF_CONFIGS[model], model)
        self.runs: list[tuple[int, int, int]] = []
        self._step = step

    def run(self, batch: int, prompt: int, output: int, sampling: dict[str, Any] | None = None) -> float:
        self.runs.append((batch, prompt, output))
        is_greedy = not sampling or sampling["temperature"] == 0
        return 0.001 * batch + self._step * output * (1 if is_greedy else 1.1)


def budget(seconds: float = 1000.0) -> Budget:
    return Budget(3, time.monotonic() + seconds)


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_decode_step_is_the_difference_of_two_runs(
    said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    engine: Any = PretendEngine("8b", 0.007)
    found = decode(engine, (1, 64), budget(), said.append)
    assert [result["decode_step_ms"] for result in found["batches"]] == pytest.approx([7, 7])
    assert found["batches"][1]["out_tok_s"] == pytest.approx(64 * 128 / (0.064 + 0.007 * 128))
    assert engine.runs == [(1, 512, 8)] + 3 * [(1, 512, 128), (1, 512, 8)] + [
        (64, 512, 8),
        *3 * [(64, 512, 128), (64, 512, 8)],
    ]
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("64 "))
    assert row == ["64", "7.00", "8.63", "1.23x", "7.47", "0.94x", "7.80", "9,143"]


def test_out_of_time_no_further_run_begins(said: list[str]) -> None:
    engine: Any = PretendEngine("1b", 0.002)
    assert decode(engine, (1, 32), budget(-1), said.append) == {"batches": []}
    assert engine.runs == []
    assert said == ["out of time before batch 1"]


def test_prefill_and_sampling(said: list[str]) -> None:
    engine: Any = PretendEngine("8b", 0.01)
    assert prefill(engine, budget(), said.append)["prompt_tok_s"] == pytest.approx(32 * 2048 / 0.042)
    found = sampling(engine, 256, budget(), said.append)
    assert found is not None
    assert found["sampled_over_greedy"] == pytest.approx(1.1)


# Of models with experts: a token's own, 3.35e9 of 30.5e9 parameters of Qwen3-30B-A3B less one embedding, and all.
@pytest.mark.parametrize(
    ("model", "batch", "weights", "kv"),
    [
        ("8b", 1, 15.0e9, 131072),
        ("1b", 256, 2.47e9, 32768),
        ("qwen3moe", 1, 2 * 3.04e9, 98304),
        ("qwen3moe", 10_000, 2 * 30.2e9, 98304),
        ("mixtral", 10_000, 46.7e9, 65536),
    ],
)
def test_bytes_of_the_models(model: str, batch: int, weights: float, kv: int) -> None:
    config = model_config_from_hf(HF_CONFIGS[model], model)
    assert weight_bytes(config, batch) == pytest.approx(weights, rel=0.01)
    assert kv_bytes(config) == kv


def test_tables_of_models_with_experts_say_what_the_floor_counts(
    said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    engine: Any = PretendEngine("mixtral", 0.01)
    decode(engine, (1, 8), budget(), said.append)
    lines = capsys.readouterr().out.splitlines()
    title = lines.index("decode step, mixtral (16 of its 32 layers), ms")
    assert lines[title + 1].endswith("experts of 8 read")
    assert lines[title + 2].split()[-1] == "2.00"
    assert lines[title + 3].split()[-1] == f"{8 * (1 - 0.75**8):.2f}"


@pytest.mark.parametrize("model", ["8b", "1b"])
def test_no_figure_is_below_its_floor(model: str) -> None:
    config = model_config_from_hf(HF_CONFIGS[model], model)
    figures = PEER["models"][model]
    for batch, peer in figures["decode_ms"].items():
        floor = floor_ms(model, config, int(batch), 580)
        # Bytes over bandwidth, which no measured floor may undercut.
        read = weight_bytes(config, int(batch)) + int(batch) * 580 * kv_bytes(config)
        assert read / (PEER["bandwidth_tb_s"] * 1e9) <= floor * 1.01
        assert floor < figures["aim_ms"][batch] < peer


def test_a_model_directory_opens(tmp_path: Path) -> None:
    path = write_model("1b", tmp_path)
    assert open_config(str(path))[0].tie_word_embeddings
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


def test_parts_of_a_day_share_a_file(tmp_path: Path) -> None:
    path = results.results_path(tmp_path, "NVIDIA H100 80GB HBM3")
    assert path.name.endswith("-nvidia-h100-80gb-hbm3.json")
    results.save(path, "gpu", "decode-8b", {"batches": [{"batch": 8, "decode_step_ms": 6.1}]})
    results.save(path, "gpu", "start-8b", {"cold": 40.0})
    parts = json.loads(path.read_text())["parts"]
    assert set(parts) == {"decode-8b", "start-8b"}
    assert parts["decode-8b"]["versions"]["jax"]
    series = decode_series(parts, "8b")
    assert series == {"vLLM 0.26.0": [(8, 7.063)], "jaxserve": [(8, 6.1)], "floor": [(8, 5.92)]}


def test_every_part_of_the_default_run_exists() -> None:
    from benchmarks.h100.__main__ import BATCHES, DEFAULT_PARTS, KINDS

    for part in DEFAULT_PARTS:
        kind, _, model = part.partition("-")
        assert kind in KINDS
        assert model in BATCHES


def test_the_tables_need_none_of_the_servers_packages() -> None:
    """An engine starts and answers where they are not installed."""
    absent = "quart uvicorn uvloop httptools pydantic msgspec zmq llguidance gguf PIL prometheus_client"
    code = f"""
import sys, tempfile
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}.split():
            raise ModuleNotFoundError(name + " is not installed")

sys.meta_path.insert(0, Absent())
from benchmarks.h100 import __main__, engine
limits = dict(max_model_len=64, max_num_seqs=1, max_num_batched_tokens=16, kv_cache_memory=1 << 22)
with tempfile.TemporaryDirectory() as folder, engine.Engine("tiny", Path(folder), limits) as found:
    found.run(1, 8, 2)
"""
    quickly = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=quickly, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
