"""What a measurement ran on: kept with every result, since a number without it says nothing."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from typing import Any

_PACKAGES = ("jaxserve", "jax", "jaxlib", "flax", "transformers", "torch", "numpy")


def environment(**extra: Any) -> dict[str, Any]:
    """Date, command line, machine and versions, then `extra`."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["jaxserve", *sys.argv[1:]]),
        "machine": {
            "cpu": _cpu_name(),
            "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        **extra,
    }


def _version(package: str) -> str | None:
    if package == "jaxserve":
        from jaxserve import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
