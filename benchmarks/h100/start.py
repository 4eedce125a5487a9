"""From launch to the first generated token, with an empty and with a filled cache of compiled programs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.h100.peer import PEER, peer_value
from benchmarks.h100.tables import print_table, ratio


def start(model: str, overrides: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Launch twice, each time in a process of its own."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache_dir:
        for name in ("cold", "warm"):
            results[name] = _launch(model, cache_dir, overrides)
            say(f"{name}: {json.dumps(results[name])}")
    rows = []
    for name, result in results.items():
        theirs = peer_value(model, "start_s") if name == "cold" else None
        seconds = result["seconds"]
        aim = peer_value(model, "start_aim_s", name)
        rows.append((name, seconds, theirs, ratio(theirs, seconds), aim, result["compiles_after_ready"]))
    print_table(
        f"launch to first generated token, {model}, s",
        ("compile cache", "jaxserve", PEER["engine"], "faster", "aim", "compiles after ready"),
        rows,
    )
    return results


def _launch(model: str, cache_dir: str, overrides: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.h100.first_token", model, cache_dir, json.dumps(overrides)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if not line or process.returncode:
        raise RuntimeError(f"the engine ended with status {process.returncode}; its message is above")
    return {"seconds": seconds, **json.loads(line)}
