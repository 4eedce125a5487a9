"""`python -m tests.conversion.killed SRC FOLDER`: converts again and again, killed a little later each time.

Every conversion has a process of its own, which ends itself by SIGKILL instead of bringing the n-th file or directory
to the disk.  FOLDER/n is what it leaves.  Prints how often a whole conversion brings something to the disk.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

from jaxserve.conversion import sources
from jaxserve.conversion.convert import convert

STEPS = (0, 1, 2, 3, 4, 8, 20, 45, -5, -4, -3, -2, -1)


def main() -> None:
    source, folder = sys.argv[1], Path(sys.argv[2])
    sources.LEAST_CHUNK_BYTES = 64
    counted = folder / "counted"
    _run(source, folder / "whole", counted=counted)
    total = int(counted.read_text())
    for step in STEPS:
        number = step % total
        _run(source, folder / str(number), killed_at=number)
    print(total)


def _run(source: str, destination: Path, *, killed_at: int = -1, counted: Path | None = None) -> None:
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        expected = signal.SIGKILL if killed_at >= 0 else 0
        assert status == expected, f"killed_at={killed_at}: status {status}"
        return
    honest, numbers = os.fsync, itertools.count()  # which several threads may ask

    def fsync(descriptor: int) -> None:
        if next(numbers) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        honest(descriptor)

    os.fsync = fsync
    convert(source, destination, progress=False)
    if counted is not None:
        counted.write_text(str(next(numbers)))
    os._exit(0)


if __name__ == "__main__":
    main()
