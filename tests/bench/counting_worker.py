"""A worker without a model for tests: `python -m tests.bench.counting_worker LOG NAME MODE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jaxserve.bench.worker_loop import claim_stdout, serve_runs


class CountingEngine:
    """Answers 0, 1, 2, … and notes every batch; may misbehave as its mode says."""

    def __init__(self, log: Path, name: str, mode: str) -> None:
        self._log = log
        self._name = name
        self._mode = mode

    def describe(self) -> dict[str, Any]:
        return {"engine": self._name, "vocab_size": 50, "dtype": "float32"}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        print("libraries print what they like")
        with self._log.open("a") as file:
            file.write(f"{self._name} {output_len} {prompts}\n")
        if self._mode == "dies":
            sys.exit(3)
        answer = list(range(output_len - 1 if self._mode == "short" else output_len))
        if self._mode == "differs":
            answer[output_len // 2 :] = [-1] * (output_len - output_len // 2)
        return [answer for _ in prompts]


if __name__ == "__main__":
    replies = claim_stdout()
    serve_runs(CountingEngine(Path(sys.argv[1]), sys.argv[2], sys.argv[3]), 0.0, replies)
