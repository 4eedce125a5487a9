"""Device time out of a trace made by hand, whose sums are known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.h100.trace import device_report, host_report, kernel_name, read_trace, spans_of

PERIOD, STEPS = 100.0, 6  # us
LAYERS = 4


def trace() -> list[dict[str, Any]]:
    """Steps of a gather (5 us), two kernels for each layer (10 and 5 us, no pause), a copy beside them."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/device:GPU:1"}},
        {"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "Stream #8(MemcpyD2H)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 9, "args": {"name": "XLA Ops"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 9, "tid": 1, "args": {"name": "python"}},
        {"ph": "M", "name": "thread_name", "pid": 9, "tid": 2, "args": {"name": "worker"}},
    ]

    def add(pid: int, tid: int, name: str, start: float, duration: float) -> None:
        events.append({"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": duration})

    for step in range(STEPS):
        at = 1000 + step * PERIOD
        add(1, 7, "gather_fusion", at, 5)
        for layer in range(LAYERS):
            add(1, 7, f"gemm_fusion_dot_{layer}_0", at + 5 + 15 * layer, 10)
            add(1, 7, f"loop_add_fusion.{layer}", at + 15 + 15 * layer, 5)
        add(1, 8, "MemcpyD2H", at + 60, 10)  # the first half beside a kernel
        add(1, 9, "gather_fusion", at, 90)  # a derived line
        add(2, 7, "gather_fusion", at, 90)  # another device
        add(9, 1, "PjitFunction(jit(forward))", at, 20)
        add(9, 2, "parse", at, 50)
    return events


def test_time_by_kernel_and_pauses() -> None:
    device, _ = spans_of(trace())
    report = device_report(device, about_steps=STEPS + 1)
    assert report is not None
    assert report.num_steps == STEPS - 1
    assert report.period == pytest.approx(PERIOD)
    assert report.busy == pytest.approx(70)  # 5 + 4 * 15, and 5 of the copy
    assert report.between == pytest.approx(30)
    assert report.pauses["10-50 us"] == (pytest.approx(1), pytest.approx(30))
    assert sum(time for _, time in report.pauses.values()) == pytest.approx(30)
    assert [(k.name, k.launches, k.microseconds) for k in report.kernels] == [
        ("gemm_fusion_dot", LAYERS, 40),
        ("loop_add_fusion", LAYERS, 20),
        ("MemcpyD2H", 1, 10),
        ("gather_fusion", 1, 5),
    ]


def test_without_a_kernel_a_step_there_is_no_report() -> None:
    device, _ = spans_of(trace())
    assert device_report(device, about_steps=100) is None
    assert device_report([], about_steps=10) is None


def test_host_events_are_those_of_the_calling_thread() -> None:
    _, host = spans_of(trace())
    (calls,) = host_report(host, STEPS)
    assert (calls.name, calls.launches, calls.microseconds) == ("PjitFunction(jit(forward))", 1, 20)


def test_a_trace_is_read_from_its_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path)
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": trace()}, file)
    device, host = read_trace(tmp_path)
    assert len(device) == STEPS * (2 + 2 * LAYERS)
    assert len(host) == STEPS * 2


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("gemm_fusion_dot_12_0", "gemm_fusion_dot"),
        ("fusion.123", "fusion"),
        ("loop_add_fusion_7", "loop_add_fusion"),
        ("nvjet_hsh_128x64_64x11_1x2", "nvjet_hsh_128x64_64x11_1x2"),
        ("paged_decode_h128", "paged_decode_h128"),
    ],
)
def test_numbers_that_tell_layers_apart_are_cut(name: str, short: str) -> None:
    assert kernel_name(name) == short
