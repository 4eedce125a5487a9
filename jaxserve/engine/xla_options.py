"""What is asked of XLA beyond its defaults, by platform and JAX version: the one place for both."""

from __future__ import annotations


def compiler_options(platform: str) -> dict[str, bool | str]:
    """Options of every program's compilation; XLA refuses names that it does not know.

    CPU: many programs compile at once, so splitting each over threads only costs (3.6 s of processor time become 2.5
    for one forward pass of a 30-layer model: 2 cores, jax 0.10.2, 2026-11-23).
    """
    return {"xla_cpu_parallel_codegen_split_count": "1"} if platform == "cpu" else {}
