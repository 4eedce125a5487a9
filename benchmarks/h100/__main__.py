"""`benchmarks/h100.sh PART …`: run parts, print their tables, keep their figures."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.h100 import parts, results
from benchmarks.h100.models import HF_CONFIGS, TEXT_MODELS
from benchmarks.h100.options import add_engine_options

if TYPE_CHECKING:
    from benchmarks.h100.engine import Engine

BATCHES = {
    "8b": (1, 8, 32, 64, 128, 256),
    "1b": (1, 32, 256),
    "mixtral": (1, 8, 32, 64, 128, 256),
    "qwen3moe": (1, 8, 32, 64, 128),  # beside 61 GB of weights there is no room for 256 sequences
    "tiny": (1, 4),
    "tinymoe": (1, 4),
    "vl7b": (1, 8, 32),
    "tinyvl": (1, 4),
}
KINDS = ("decode", "prefill", "e2e", "sampling", "start", "vision")
DEFAULT_PARTS = ("decode-8b", "prefill-8b", "sampling-8b", "decode-1b", "prefill-1b", "start-8b")


def main() -> int:
    """Run the parts in the order given, those of one model one after the other in one engine."""
    args = _parse()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxserve").setLevel(logging.INFO)  # where the seconds of a start go
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as engines:
        engine: Engine | None = None
        for part in args.parts:
            kind, _, model = part.partition("-")
            deadline = time.monotonic() + args.limit
            if kind == "start":
                from benchmarks.h100.start import start

                result: dict[str, Any] | None = start(model, args.engine, say)
                device = result["cold"]["device"]
            elif kind == "vision":
                from benchmarks.h100.vision import vision

                engines.close()
                engine = None
                gc.collect()
                result = vision(model, Path(folder), args.engine, args.repeats, say)
                device = result["device"]
            else:
                if engine is None or engine.model != model:
                    engines.close()
                    engine = None  # or the next model would not find its memory free
                    gc.collect()
                    engine = _open(model, Path(folder), args.engine, say)
                    engines.enter_context(engine)
                budget = parts.Budget(args.repeats, deadline)
                result = _run(kind, engine, args, budget, say)
                device = engine.info.device
                compiles = engine.compiles_after_ready
                say(f"compiles after ready: {compiles}")
                if result is not None:
                    result["num_layers"] = engine.model_config.num_layers
                    result |= {"load_seconds": engine.load_seconds, "compiles_after_ready": compiles}
            if result is not None:
                path = results.results_path(args.results, device)
                name = f"profile-{part}" if args.profile else part
                results.save(path, device, name, {"engine_options": args.engine, **result})
                say(f"{name} is in {path}")
    return 0


def _open(model: str, folder: Path, overrides: dict[str, Any], say: Any) -> Engine:
    from benchmarks.h100.engine import Engine

    say(f"starting {model} …")
    engine = Engine(model, folder, overrides)
    say(f"{model} is ready after {engine.load_seconds:.1f} s: {engine.info}")
    return engine


def _run(
    kind: str, engine: Engine, args: argparse.Namespace, budget: parts.Budget, say: Any
) -> dict[str, Any] | None:
    batches: Sequence[int] = args.batches or BATCHES[engine.model]
    if args.profile:
        from benchmarks.h100.engine import GREEDY, SAMPLED
        from benchmarks.h100.profiling import profile_decode

        sampling = SAMPLED if kind == "sampling" else GREEDY
        profiles = [
            profile_decode(engine, n, args.profile_dir / f"{engine.model}-{n}", say, sampling)
            for n in batches
        ]
        return {"profiles": profiles}
    if kind == "decode":
        return parts.decode(engine, batches, budget, say)
    if kind == "e2e":
        return parts.end_to_end(engine, batches, budget, say)
    if kind == "prefill":
        return parts.prefill(engine, budget, say)
    return parts.sampling(engine, max(batches), budget, say)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/h100.sh",
        description="Measure this machine's GPU with random weights of published dimensions, beside vLLM's figures.",
        epilog=f"Parts are KIND or KIND-MODEL with KIND one of {', '.join(KINDS)} and MODEL one of "
        f"{', '.join(HF_CONFIGS)} (default 8b); tiny, tinymoe and tinyvl are rehearsals without a GPU. "
        f"Without parts: {' '.join(DEFAULT_PARTS)}.",
    )
    add = parser.add_argument
    add("parts", nargs="*", default=list(DEFAULT_PARTS), metavar="PART")
    add("--batches", type=_counts, metavar="N,N,…", help="batch sizes (default: vLLM's table)")
    add("--repeats", type=int, default=3, help="of each run, of which the median counts (default: 3)")
    add("--limit", type=float, default=230, metavar="SECONDS", help="no new run of a part after that (230)")
    add_engine_options(parser)
    add(
        "--profile",
        action="store_true",
        help="instead of timing, trace about 12 decode steps a batch size and print device time by kernel",
    )
    add("--profile-dir", type=Path, default=Path("/tmp/jaxserve-profile"), help="where traces go")
    add("--results", type=Path, default=results.FOLDER, help="folder of the results file")
    args = parser.parse_args()
    for index, part in enumerate(args.parts):
        kind, _, model = part.partition("-")
        if kind not in KINDS or (model and model not in HF_CONFIGS):
            parser.error(f"unknown part {part!r}")
        if kind == "vision" and model in TEXT_MODELS:
            parser.error(f"{model} takes no images")
        if args.profile and kind not in ("decode", "sampling"):
            parser.error(f"--profile traces decode and sampling, not {part}")
        args.parts[index] = f"{kind}-{model or ('vl7b' if kind == 'vision' else '8b')}"
    # JAX keeps the device's memory to the end of a process: those that start processes of their own come first.
    args.parts.sort(key=lambda part: not part.startswith("start"))
    args.engine = dict(args.engine)
    return args


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
