"""Traces some decode steps of a running engine and prints where their time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from benchmarks.h100.engine import GREEDY, Engine
from benchmarks.h100.parts import PROMPT
from benchmarks.h100.tables import print_table
from benchmarks.h100.trace import DeviceReport, KernelTime, device_report, host_report, read_trace

STEPS = 12
_SETTLED = 8  # decode steps before the trace begins
_KERNELS_SHOWN, _HOST_SHOWN = 30, 15


def profile_decode(
    engine: Engine, batch: int, folder: Path, say: Callable[[str], None], sampling: dict[str, Any] = GREEDY
) -> dict[str, Any]:
    """Trace about STEPS decode steps at `batch` into `folder`, print tables, return them."""
    engine.run(batch, PROMPT, 8, sampling)
    before = engine.num_steps
    engine.run(batch, PROMPT, 1, sampling)
    prefill_steps = engine.num_steps - before  # of a run like the one to come
    start = engine.num_steps
    with engine.decoding(batch, PROMPT, sampling):
        _wait_for(engine, start + prefill_steps + _SETTLED)
        start_trace(folder)
        first, began = engine.num_steps, time.perf_counter()
        _wait_for(engine, first + STEPS)
        last, wall = engine.num_steps, time.perf_counter() - began
    jax.profiler.stop_trace()
    device, host = read_trace(folder)
    report = device_report(device, last - first)
    host_times = host_report(host, last - first)[:_HOST_SHOWN]
    say(
        f"trace: {last - first} steps in {wall * 1000:.1f} ms with the profiler on, {len(device)} device events"
    )
    title = f"{engine.model}, batch {batch}"
    if report is None:
        say("no kernel marks the steps: nothing ran on a GPU, or the trace was cut off")
    else:
        print_device(report, title)
    _print_times(f"host events of the engine's thread, {title}, a step (they nest)", host_times)
    return {
        "batch": batch,
        "device": None if report is None else asdict(report),
        "host": [asdict(event) for event in host_times],
    }


def start_trace(folder: Path) -> None:
    """Begin a trace of kernels and of the host's calls, to be ended by jax.profiler.stop_trace."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own events would crowd out the kernels
    options.host_tracer_level = 2
    jax.profiler.start_trace(str(folder), profiler_options=options)


def _wait_for(engine: Engine, step: int) -> None:
    """Until the engine has planned `step` steps."""
    while engine.num_steps < step:
        time.sleep(0.001)


def print_device(report: DeviceReport, title: str) -> None:
    """Tables of a step's device time: busy or not, and by kernel."""
    share = 100 * report.busy / report.period
    print_table(
        f"device, {title}: {report.num_steps} whole steps",
        ("", "us a step"),
        [
            ("step", report.period),
            ("busy", report.busy),
            ("busy share, %", share),
            ("longest pause (between steps)", report.between),
            *((f"pauses of {name}: {n:.1f}", time) for name, (n, time) in report.pauses.items()),
        ],
    )
    shown = report.kernels[:_KERNELS_SHOWN]
    rest = report.kernels[_KERNELS_SHOWN:]
    if rest:
        launches, microseconds = sum(k.launches for k in rest), sum(k.microseconds for k in rest)
        shown = [*shown, KernelTime(f"({len(rest)} more)", launches, microseconds)]
    _print_times(f"kernels, {title}, a step", shown)


def _print_times(title: str, times: list[KernelTime]) -> None:
    total = sum(time.microseconds for time in times) or 1.0
    rows = [
        (
            time.name[:90],
            time.launches,
            time.microseconds,
            time.microseconds / max(time.launches, 1e-9),
            f"{100 * time.microseconds / total:.1f}",
        )
        for time in times
    ]
    print_table(title, ("name", "launches", "us", "us each", "%"), rows)
