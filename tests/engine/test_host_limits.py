"""Memory and processors as the kernel tells of them: a pretend /proc and /sys, for both versions of cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxserve.engine.host_limits import free_memory, num_processors

MIB = 2**20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors, 1000 MiB free, no cgroups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    write(tmp_path, {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {1000 * 1024} kB\n"})
    return tmp_path


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def test_without_cgroups_it_is_the_machine(machine: Path) -> None:
    assert free_memory(machine) == 1000 * MIB
    assert num_processors(machine) == 8


def test_unknown_memory_is_none(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert num_processors(tmp_path) >= 1


def test_unified_groups_and_those_above_them_limit(machine: Path) -> None:
    group = "sys/fs/cgroup/slice/service"
    write(
        machine,
        {
            "proc/self/cgroup": "0::/slice/service",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory",
            f"{group}/memory.max": "max",
            f"{group}/memory.current": 50 * MIB,
            f"{group}/cpu.max": "250000 100000",
            "sys/fs/cgroup/slice/memory.max": 400 * MIB,
            "sys/fs/cgroup/slice/memory.current": 300 * MIB,
            "sys/fs/cgroup/slice/memory.stat": f"anon {200 * MIB}\ninactive_file {80 * MIB}",
            "sys/fs/cgroup/slice/cpu.max": "max 100000",
        },
    )
    assert free_memory(machine) == 180 * MIB
    assert num_processors(machine) == 2


def test_groups_of_version_1_limit(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/",
            # As in a container: the group itself is mounted, without the host's path.
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 256 * MIB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 100 * MIB,
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {10 * MIB}",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 50000,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    )
    assert free_memory(machine) == 166 * MIB
    assert num_processors(machine) == 1  # never none


def test_groups_without_a_limit_do_not_limit(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "5:memory:/\n4:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 100 * MIB,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    )
    assert free_memory(machine) == 1000 * MIB
    assert num_processors(machine) == 8


def test_affinity_limits(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert num_processors(machine) == 3
