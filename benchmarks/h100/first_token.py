"""`python -m benchmarks.h100.first_token MODEL CACHE_DIR OVERRIDES-as-JSON`: start, one token, and say so."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

from benchmarks.h100.engine import Engine


def main() -> int:
    """Print the times as JSON once the first token is there; the parent takes the whole time."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxserve").setLevel(logging.INFO)  # where the seconds of a start go
    model, cache_dir, overrides = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(model, Path(folder), overrides | {"compile_cache_dir": cache_dir}) as engine,
    ):
        seconds = engine.run(1, 512, 1)
        found = {
            "load_seconds": engine.load_seconds,
            "first_token_seconds": seconds,
            "compiles_after_ready": engine.compiles_after_ready,
            "device": engine.info.device,
        }
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
