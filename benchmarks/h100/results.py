"""The results file: one a day and device, which each part fills in."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from jaxserve.bench.environment import environment

FOLDER = Path(__file__).resolve().parent.parent / "results"


def results_path(folder: Path, device: str) -> Path:
    """`<date>-<device>.json` in `folder`."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{name}.json"


def save(path: Path, device: str, part: str, result: dict[str, Any]) -> None:
    """Put `result` under its part's name into the file, beside what other parts left there."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    about = environment(device=device, driver=_driver())
    about["command"] = f"benchmarks/h100.sh {part}"
    content["parts"][part] = about | result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
