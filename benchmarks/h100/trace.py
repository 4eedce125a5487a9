"""Where a decode step's time goes: device time by kernel out of a jax.profiler trace."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_IDLE_CLASSES = (2.0, 10.0, 50.0)  # us; bounds of the classes of pauses that are reported
_CALLS = ("PjitFunction", "CommonPjRtLoadedExecutable::Execute")  # on the thread that calls programs


@dataclass(frozen=True)
class Span:
    """One kernel or copy on a device, or one host event; microseconds."""

    name: str
    thread: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel name, a step."""

    name: str
    launches: float
    microseconds: float


@dataclass(frozen=True)
class DeviceReport:
    """Device time of whole steps; all figures a step, in microseconds."""

    num_steps: int
    period: float  # from one step's begin to the next one's
    busy: float  # with at least one kernel or copy under way
    between: float  # the longest pause of a step: as a rule the one before the next step begins
    pauses: dict[str, tuple[float, float]]  # class of length -> (number, microseconds)
    kernels: list[KernelTime]  # the longest first


def read_trace(folder: Path) -> tuple[list[Span], list[Span]]:
    """(device spans, host spans) of the newest trace under `folder`, each in order of their start.

    Device spans are those of the GPU's streams, of the first GPU alone: what runs at the same time on others
    would count twice.  FileNotFoundError if there is no trace.
    """
    files = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no .trace.json.gz under {folder}")
    with gzip.open(files[-1], "rt", encoding="utf-8") as file:
        return spans_of(json.load(file)["traceEvents"])


def spans_of(events: Iterable[dict[str, Any]]) -> tuple[list[Span], list[Span]]:
    """See read_trace."""
    processes: dict[int, str] = {}
    threads: dict[tuple[int, int], str] = {}
    timed = []
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
        elif event.get("ph") == "X":
            timed.append(event)
    gpus = sorted(pid for pid, name in processes.items() if "device:GPU" in name)
    device, host = [], []
    for event in timed:
        thread = threads.get((event["pid"], event["tid"]), "")
        span = Span(event["name"], f"{thread}/{event['tid']}", float(event["ts"]), float(event.get("dur", 0)))
        # Lines such as "XLA Ops" repeat the streams' time under other names.
        if gpus and event["pid"] == gpus[0] and thread.startswith("Stream"):
            device.append(span)
        elif "host:CPU" in processes.get(event["pid"], ""):
            host.append(span)
    return sorted(device, key=lambda s: s.start), sorted(host, key=lambda s: s.start)


def device_report(spans: Sequence[Span], about_steps: int) -> DeviceReport | None:
    """Device time a step; None if no kernel marks the steps.

    `about_steps` is how many steps the trace holds, give or take a few: the kernel that was launched about so
    often, at the most even pace, marks where a step begins.  Only whole steps count.
    """
    marks = _marks(spans, about_steps)
    if marks is None:
        return None
    begin, end, steps = marks[0], marks[-1], len(marks) - 1
    inside = [span for span in spans if begin <= span.start < end]
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for span in inside:
        total = totals[kernel_name(span.name)]
        total[0] += 1
        total[1] += span.duration
    kernels = [KernelTime(name, n / steps, time / steps) for name, (n, time) in totals.items()]
    pauses = _pauses(inside, end)
    classes = {}
    for low, high in zip((0.0, *_IDLE_CLASSES), (*_IDLE_CLASSES, float("inf")), strict=True):
        lengths = [length for _, length in pauses if low <= length < high]
        name = f"{low:.0f}-{high:.0f} us" if high < float("inf") else f"over {low:.0f} us"
        classes[name] = (len(lengths) / steps, sum(lengths) / steps)
    period = (end - begin) / steps
    longest = [
        max((length for at, length in pauses if here <= at < after), default=0.0)
        for here, after in itertools.pairwise(marks)
    ]
    return DeviceReport(
        num_steps=steps,
        period=period,
        busy=period - sum(length for _, length in pauses) / steps,
        between=statistics.median(longest),
        pauses=classes,
        kernels=sorted(kernels, key=lambda k: -k.microseconds),
    )


def host_report(spans: Sequence[Span], num_steps: int) -> list[KernelTime]:
    """Host events of the thread that calls programs, a step, the longest first; they nest."""
    calls = Counter(span.thread for span in spans if span.name.startswith(_CALLS))
    if not calls:
        return []
    (thread, _), *_ = calls.most_common(1)
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for span in spans:
        if span.thread == thread:
            total = totals[kernel_name(span.name)]
            total[0] += 1
            total[1] += span.duration
    times = [KernelTime(name, n / num_steps, time / num_steps) for name, (n, time) in totals.items()]
    return sorted(times, key=lambda k: -k.microseconds)


def kernel_name(name: str) -> str:
    """Without the numbers that XLA appends to tell one fusion from another: layers share a row."""
    return re.sub(r"([._]\d+)+(?=_|$)", "", name)


def _marks(spans: Sequence[Span], about_steps: int) -> list[float] | None:
    """Starts of the steps: of the kernel, launched about once a step, whose launches are most evenly spaced."""
    starts: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        starts[span.name].append(span.start)
    slack = max(3, about_steps // 2)
    best: tuple[float, float] | None = None
    marks = None
    for times in starts.values():
        if len(times) < 3 or abs(len(times) - about_steps) > slack:
            continue
        gaps = [b - a for a, b in itertools.pairwise(times)]
        unevenness = statistics.pstdev(gaps) / statistics.mean(gaps)
        score = (round(unevenness, 1), times[0])  # of about even ones, the first
        if best is None or score < best:
            best, marks = score, times
    return marks


def _pauses(spans: Sequence[Span], end: float) -> list[tuple[float, float]]:
    """(start, length) of each time in which nothing ran, up to `end`."""
    pauses = []
    busy_until = spans[0].start if spans else end
    for span in spans:
        if span.start > busy_until:
            pauses.append((busy_until, span.start - busy_until))
        busy_until = max(busy_until, span.end)
    if end > busy_until:
        pauses.append((busy_until, end - busy_until))
    return pauses
