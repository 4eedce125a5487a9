"""The parent's side of a throughput run: starts a worker, sends it batches, reads back times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jaxserve
from jaxserve.errors import JaxserveError


class WorkerProcess:
    """One engine in a process of its own, so that memory and threads of two engines do not mix."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], python: str = sys.executable
    ) -> None:
        """`module` is run by `python` (which need not have jaxserve installed) with `arguments`."""
        self.name = name
        self._command = [python, "-m", module, *arguments]
        self._process: subprocess.Popen[str] | None = None
        self.description: dict[str, Any] = {}

    def __enter__(self) -> Self:
        root = str(Path(jaxserve.__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            self.description = self._receive()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, prompts: list[list[int]], output_len: int) -> tuple[float, list[list[int]]]:
        """Seconds that one batch took inside the worker, and the tokens; refuses answers of wrong length."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "output_len": output_len}) + "\n")
        self._process.stdin.flush()
        reply = self._receive()
        lengths = {len(ids) for ids in reply["token_ids"]}
        if len(reply["token_ids"]) != len(prompts) or lengths != {output_len}:
            raise JaxserveError(
                f"{self.name} gave answers of {sorted(lengths)} tokens for {output_len}: no fair run"
            )
        return reply["seconds"], reply["token_ids"]

    def _receive(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise JaxserveError(
                f"{self.name} ended with status {self._process.wait()}; its own message is above"
            )
        return json.loads(line)

    def _stop(self) -> None:
        """Close its input, which ends it; insist after a while."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended by itself
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
