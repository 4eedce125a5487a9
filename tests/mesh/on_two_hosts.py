"""`python -m tests.mesh.on_two_hosts RANK PORT FOLDER CASE…`: one of two processes that share engines; rank 0 answers.

A case is FAMILY:hosts, or FAMILY:hosts:experts with expert parallelism.  PORT and a port a case behind it are free.
What rank 0 has compiled the other finds in FOLDER.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from unittest import mock

import jax

from jaxserve.engine import settle
from jaxserve.engine.compile_cache import CompileCache
from jaxserve.engine.hosts import link, runtime
from jaxserve.engine.hosts.session import follow
from tests.mesh.models import checkpoint
from tests.mesh.on_eight_devices import answers, engine_config, few_shapes, processor
from tests.patience import PATIENCE


def waiting(load: Any) -> Any:
    """CompileCache.load of a host that compiles nothing itself: it takes half the time."""

    def wait(cache: CompileCache, name: str) -> jax.stages.Compiled:
        while (found := load(cache, name)) is None:
            time.sleep(0.05)  # if rank 0 is lost, so is this process
        return found

    return wait


def main() -> None:
    rank, port, folder, *cases = sys.argv[1:]
    link.LOST_SECONDS = PATIENCE  # type: ignore[misc]  # a busy machine may stand still for six seconds
    runtime._SHUTDOWN_SECONDS = int(PATIENCE)  # behind which JAX aborts a process that ends before the other
    for number, case in enumerate(cases):
        family, _, *parallel = case.split(":")
        config = engine_config(
            folder,
            tensor_parallel_size=2,
            enable_expert_parallel=bool(parallel),
            nnodes=2,
            node_rank=int(rank),
            master_addr="127.0.0.1",
            master_port=int(port) + number,  # JAX's processes meet at the first, engines behind their own
        )
        if rank == "0":
            print(json.dumps({"case": case, "answers": answers(family, config)}), flush=True)
            continue
        stored = checkpoint(family)
        with (
            mock.patch.object(settle, "build_lattice", few_shapes),
            mock.patch.object(CompileCache, "load", waiting(CompileCache.load)),
        ):
            follow(config, stored, stored.config, processor(family))


if __name__ == "__main__":
    main()
