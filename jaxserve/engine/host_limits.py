"""What this process may use of its machine: memory and processors, under cgroups and affinity too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 2**60  # version 1 says "no limit" with a number near 2**63, rounded down to a page


def free_memory(root: Path = _ROOT) -> int | None:
    """Bytes that can still be taken: the machine's free ones, or fewer under a cgroup's limit.

    None where the system does not tell.  A group's file cache counts as free, as in the kernel's MemAvailable.
    """
    found = [_machine_memory(root)]
    for group in _groups(root, "memory"):
        if group.is_unified:
            limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        found += [_free_in(folder, limit, usage, cache) for folder in group.folders]
    known = [count for count in found if count is not None]
    return min(known) if known else None


def num_processors(root: Path = _ROOT) -> int:
    """Processors that can be kept busy: those the process may run on, or fewer under a cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [
        quota
        for group in _groups(root, "cpu")
        for folder in group.folders
        if (quota := _quota(folder, is_unified=group.is_unified)) is not None
    ]
    return max(1, min([allowed, *(round(quota) for quota in quotas)]))


class _Group:
    """Where the kernel tells of a controller for this process: the group's folder and those above it."""

    def __init__(self, mount: Path, path: str, *, is_unified: bool) -> None:
        self.is_unified = is_unified
        # In a container the path may be the host's, and the mount the group itself.
        folder = mount / path.lstrip("/")
        if not folder.is_dir():
            folder = mount
        above = [parent for parent in folder.parents if parent.is_relative_to(mount)]
        self.folders = [folder, *above]


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            # Beside version 1 the unified hierarchy is mounted a level down, and seldom limits anything.
            for mount in (mounts, mounts / "unified"):
                if (mount / "cgroup.controllers").exists():
                    yield _Group(mount, path, is_unified=True)
                    break
        elif controller in controllers.split(","):
            for name in (controller, controllers):
                if (mounts / name).is_dir():
                    yield _Group(mounts / name, path, is_unified=False)
                    break


def _machine_memory(root: Path) -> int | None:
    lines = _read(root / "proc/meminfo").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _free_in(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    at_most, used = _number(folder / limit), _number(folder / usage)
    if at_most is None or used is None or at_most >= _UNLIMITED:
        return None
    statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return max(0, at_most - used + int(statistics.get(cache, 0)))


def _quota(folder: Path, *, is_unified: bool) -> float | None:
    """Processors' worth of time a group may use, None for no limit."""
    if is_unified:
        words = _read(folder / "cpu.max").split()
        return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
