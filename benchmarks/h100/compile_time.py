"""`python -m benchmarks.h100.compile_time --settings a,b`: seconds to compile every program, cold, by settings of XLA.

Each in a process of its own, since XLA remembers what it has tuned.  No weights are loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.h100.engine import SETTINGS
from benchmarks.h100.models import TEXT_MODELS, write_model
from benchmarks.h100.tables import print_table
from jaxserve.config import EngineConfig
from jaxserve.engine import compile_cache
from jaxserve.engine.building import weights_bytes
from jaxserve.engine.compile_cache import CompileCache
from jaxserve.engine.compiling import check_memory, compile_all
from jaxserve.engine.programs import ProgramBook
from jaxserve.engine.settle import settle
from jaxserve.engine.xla_options import compiler_options
from jaxserve.loading.resolve import open_config
from jaxserve.models.parameters import abstract_model

# What each asks of XLA over what the engine asks; None takes an option back.
CHOICES: dict[str, dict[str, Any]] = {
    "engine": {},
    "triton": {"xla_gpu_enable_triton_gemm": None},  # kernels of XLA's own for any number of rows
    "cublas": {"xla_gpu_enable_triton_gemm": False},  # and for none
    "cublaslt": {"xla_gpu_enable_cublaslt": True},  # the library's newer door
    "level3": {"xla_gpu_autotune_level": "3"},  # results of tuned kernels are not compared
    "untuned": {"xla_gpu_autotune_level": "0"},  # the first kernel that compiles: what all but tuning takes
}
SHOWN = 60  # of the programs, those that end last


class _Timed(CompileCache):
    """Keeps nothing on disk, and notes of each program when it was taken up, when lowered and when compiled."""

    def __init__(self) -> None:
        super().__init__(None, "")
        self.began = time.perf_counter()
        self.seconds: dict[str, tuple[float, float, float]] = {}
        self._lock = threading.Lock()

    def compile(
        self, name: str, lower: Callable[[], jax.stages.Lowered], rows: int = 0
    ) -> jax.stages.Compiled:
        began = time.perf_counter() - self.began
        lowered: list[float] = []

        def timed_lower() -> jax.stages.Lowered:
            result = lower()
            lowered.append(time.perf_counter() - self.began)
            return result

        compiled = super().compile(name, timed_lower, rows)
        with self._lock:
            self.seconds[name] = (began, lowered[0], time.perf_counter() - self.began)
        return compiled


def measure(choice: str, model: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Compile in this process, and say how long it took."""

    def chosen(platform: str, num_devices: int = 1, rows: int = 0) -> dict[str, Any]:
        options = {**compiler_options(platform, num_devices, rows), **CHOICES[choice]}
        return {name: value for name, value in options.items() if value is not None}

    compile_cache.compiler_options = chosen
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(model, Path(folder))
        config = EngineConfig(model=str(path), **(SETTINGS | overrides))
        model_config = open_config(str(path))[0]
    settings = settle(config, model_config, weights_bytes(model_config))
    book = ProgramBook(settings, *abstract_model(model_config, jnp.dtype(settings.dtype)))
    cache = _Timed()
    began = time.perf_counter()
    programs = compile_all(book, cache, show_progress=False)
    seconds = time.perf_counter() - began
    check_memory(programs, settings.memory)
    return {"seconds": seconds, "device": settings.device_kind, "programs": cache.seconds}


def main() -> int:
    """Compare the choices, one after the other; `--one` is what each process runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h100.compile_time", description=__doc__)
    parser.add_argument("--settings", default="engine,triton", help=f"of {', '.join(CHOICES)}")
    parser.add_argument("--model", choices=TEXT_MODELS, default="8b")
    parser.add_argument("--engine", type=json.loads, default={}, help="engine options as a JSON object")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.settings.split(",")
    if unknown := set(names) - set(CHOICES):
        parser.error(f"unknown settings {', '.join(sorted(unknown))}")
    if args.one:
        print(json.dumps(measure(names[0], args.model, args.engine)), flush=True)
        return 0
    for name in names:
        command = [sys.executable, "-m", "benchmarks.h100.compile_time", "--one", "--settings", name]
        command += ["--model", args.model, "--engine", json.dumps(args.engine)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        _show(name, json.loads(output.splitlines()[-1]))
    return 0


def _show(name: str, result: dict[str, Any]) -> None:
    programs: dict[str, tuple[float, float, float]] = result["programs"]
    last = sorted(programs, key=lambda program: -programs[program][2])
    rows: list[tuple[Any, ...]] = [
        (program, *programs[program], programs[program][2] - programs[program][1]) for program in last[:SHOWN]
    ]
    print_table(
        f"{name}: {len(programs)} programs in {result['seconds']:.1f} s on {result['device']}; s",
        ("program", "taken up", "lowered", "compiled", "compiling"),
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
