"""`benchmarks/h100_tp.sh`: decode steps and prefill of one model over 1, 2 and 4 GPUs, beside the peer's."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.h100 import results
from benchmarks.h100.models import HF_CONFIGS, title_of
from benchmarks.h100.peer import PEER, peer_value
from benchmarks.h100.tables import print_table, ratio

_COUNT = "import jax; print(len(jax.devices()))"


def main() -> int:
    """Measure each size in a process of its own, since JAX keeps the devices' memory to the end of one."""
    args = _parse()
    sizes: list[int] = args.sizes or [size for size in (1, 2, 4) if size <= _num_devices()]
    found = {size: _measure(size, args) for size in sizes}
    if args.profile:
        return 0
    print_table(
        f"decode step, {title_of(args.model)} over several GPUs, ms",
        ("GPUs, batch", "jaxserve", PEER["engine"], "faster", "aim"),
        [
            _row(
                f"{size}, {measured['batch']}",
                measured["decode_step_ms"],
                *_peer_step(args.model, size, measured),
            )
            for size, parts in found.items()
            for measured in parts["decode"]["batches"]
        ],
    )
    rows = []
    for size, parts in found.items():
        ours = parts["prefill"]["prompt_tok_s"]
        theirs, aim = (_peer(args.model, size, name) for name in ("prefill_tok_s", "prefill_aim_tok_s"))
        rows.append((f"{size}", ours, theirs, ratio(ours, theirs), aim))
    print_table(
        f"prefill, {title_of(args.model)} over several GPUs, tok/s",
        ("GPUs", "jaxserve", PEER["engine"], "ratio", "aim"),
        rows,
    )
    return 0


def _measure(size: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the parts say of one size, by kind; also kept in the results file."""
    kinds = ("decode",) if args.profile else ("decode", "prefill")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.h100", *(f"{kind}-{args.model}" for kind in kinds)]
        command += ["--batches", args.batches, "--repeats", str(args.repeats), "--results", folder]
        for option in (f"tensor_parallel_size={size}", *args.engine):
            command += ["--engine", option]
        if args.profile:
            command += ["--profile", "--profile-dir", f"/tmp/jaxserve-profile-tp{size}"]
        print(f"--- {size} of the GPUs: {' '.join(command[2:])}", flush=True)
        subprocess.run(command, check=True)
        if args.profile:
            return {}
        (path,) = Path(folder).iterdir()
        content = json.loads(path.read_text(encoding="utf-8"))
    found = {kind: content["parts"][f"{kind}-{args.model}"] for kind in kinds}
    for kind, part in found.items():
        name = f"{kind}-{args.model}-tp{size}"
        kept = results.results_path(args.results, part["device"])
        results.save(kept, part["device"], name, part | {"command": "benchmarks/h100_tp.sh"})
    return found


def _row(
    name: str, ours: float, theirs: float | None, aim: float | None
) -> tuple[str, float, float | None, str | None, float | None]:
    return name, ours, theirs, ratio(theirs, ours), aim


def _peer_step(model: str, size: int, measured: dict[str, Any]) -> tuple[float | None, float | None]:
    batch = measured["batch"]
    return _peer(model, size, "decode_ms", batch), _peer(model, size, "aim_ms", batch)


def _peer(model: str, size: int, *keys: str | int) -> float | None:
    """The peer's figure, or our aim, for so many GPUs."""
    return peer_value(model, *keys) if size == 1 else peer_value(model, "tensor_parallel", size, *keys)


def _num_devices() -> int:
    """In another process, as this one must not take the devices."""
    found = subprocess.run([sys.executable, "-c", _COUNT], check=True, capture_output=True, text=True)
    return int(found.stdout)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/h100_tp.sh", description=__doc__)
    add = parser.add_argument
    add("sizes", nargs="*", type=int, metavar="GPUS", help="default: 1, 2 and 4, as many as there are")
    add("--model", choices=tuple(HF_CONFIGS), default="8b")
    add("--batches", default="1,64,256", metavar="N,N,…")
    add("--repeats", type=int, default=3, help="of each run, of which the median counts (default: 3)")
    add(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an engine option; may be repeated",
    )
    add(
        "--profile",
        action="store_true",
        help="instead of timing, trace decode steps (benchmarks/h100.sh --profile)",
    )
    add("--results", type=Path, default=results.FOLDER, help="folder of the results file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
