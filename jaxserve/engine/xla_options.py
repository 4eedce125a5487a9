"""What is asked of XLA beyond its defaults, by platform and JAX version: the one place for both."""

from __future__ import annotations

from dataclasses import dataclass

import jax

# The kinds of operation that XLA puts into CUDA graphs by itself, and the one that it leaves out.  As an option of
# one compilation the list must be whole: "+COLLECTIVES" is understood in XLA_FLAGS alone (jax 0.10.2, 0.11.2).
_GRAPH_DEFAULT = ("FUSION", "CUBLAS", "CUBLASLT", "CUSTOM_CALL", "CUDNN", "DYNAMIC_SLICE_FUSION")


@dataclass(frozen=True, slots=True)
class _Option:
    name: str
    value: bool | str
    platform: str
    several_devices: bool = False  # only for programs that span several
    since: tuple[int, ...] = ()  # first JAX version that has it
    until: tuple[int, ...] = (1000,)  # first JAX version that has it no more


_OPTIONS = (
    # Many programs compile at once, so splitting each over threads only costs (3.6 s of processor time become 2.5
    # for one forward pass of a 30-layer model: 2 cores, jax 0.10.2, 2026-11-23).
    _Option("xla_cpu_parallel_codegen_split_count", "1", "cpu"),
    # A decode step on one device is one graph by default.  On several every all-reduce would cut it: 26 launches
    # become one (compiled for H100, jax 0.11.2, 2026-11-22).
    _Option("xla_gpu_enable_command_buffer", ",".join((*_GRAPH_DEFAULT, "COLLECTIVES")), "gpu", True),
    _Option("xla_gpu_graph_min_graph_size", "1", "gpu", True),
)


def compiler_options(platform: str, num_devices: int = 1) -> dict[str, bool | str]:
    """Options of every program's compilation; XLA refuses names that it does not know.

    `num_devices` is how many devices one program spans.
    """
    version = jax.__version_info__
    return {
        option.name: option.value
        for option in _OPTIONS
        if option.platform == platform
        and option.since <= version < option.until
        and (num_devices > 1 or not option.several_devices)
    }
