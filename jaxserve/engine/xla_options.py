"""What is asked of XLA beyond its defaults, by platform and JAX version: the one place for both."""

from __future__ import annotations

from dataclasses import dataclass

import jax

# The kinds of operation that XLA puts into CUDA graphs by itself, and the one that it leaves out.  As an option of
# one compilation the list must be whole: "+COLLECTIVES" is understood in XLA_FLAGS alone (jax 0.10.2, 0.11.2).
_GRAPH_DEFAULT = ("FUSION", "CUBLAS", "CUBLASLT", "CUSTOM_CALL", "CUDNN", "DYNAMIC_SLICE_FUSION")

# From here on a GPU's matrix products are the library's.  Forward passes of Llama's dimensions with XLA's own kernels
# and with the library's, ms: of 8B 6.48 and 6.58 at 32 rows, 7.69 and 7.67 at 64, 9.66 and 9.43 at 128, 13.71 and 13.54
# at 256; of 1B 1.67 and 1.70 at 64, 2.27 and 2.16 at 128, 3.17 and 3.13 at 256 (python -m benchmarks.h100.forward,
# H100, jax 0.11.2, 2026-11-25).
LIBRARY_ROWS = 64

# Up to here a GPU's all-reduces are NCCL's, inside the graph.  XLA's own kernel is quicker, but goes into no graph, and
# around it the device pauses.  Forward passes of Llama 8B over two GPUs with XLA's kernel and with NCCL's, ms: 4.06 and
# 3.78 at 1 row, 4.36 and 4.06 at 16, 4.87 and 4.51 at 64, 6.62 and 6.42 at 128, but 9.23 and 9.95 (not yet
# SERIALIZEd) at 256 (python -m benchmarks.h100.forward --engine tensor_parallel_size=2, 2 x H100, jax 0.11.2,
# 2026-11-26).
NCCL_ROWS = 128


@dataclass(frozen=True, slots=True)
class _Option:
    name: str
    value: bool | str
    platform: str
    several_devices: bool = False  # only for programs that span several
    least_rows: int = 0  # only for programs whose matrix products have as many rows of activations
    most_rows: int | None = None  # and no more than so many
    since: tuple[int, ...] = ()  # first JAX version that has it


_OPTIONS = (
    # Many programs compile at once, so splitting each over threads only costs (3.6 s of processor time become 2.5
    # for one forward pass of a 30-layer model: 2 cores, jax 0.10.2, 2026-11-23).
    _Option("xla_cpu_parallel_codegen_split_count", "1", "cpu"),
    # A decode step on one device is one graph by default.  On several every all-reduce would cut it.  That of many rows
    # stays outside: all-reduces of 4 MB in a graph ended in illegal addresses (devices.py).  WHILE, which would make
    # one graph of a whole burst, is refused with all-reduces inside: "Failed to instantiate CUDA graph:
    # CUDA_ERROR_INVALID_VALUE" (4 x H100, jax 0.11.2, 2026-11-26).
    _Option(
        "xla_gpu_enable_command_buffer",
        ",".join((*_GRAPH_DEFAULT, "COLLECTIVES")),
        "gpu",
        True,
        most_rows=NCCL_ROWS,
    ),
    _Option("xla_gpu_graph_min_graph_size", "1", "gpu", True),
    _Option(
        "xla_gpu_experimental_use_collective_kernels", "", "gpu", True, most_rows=NCCL_ROWS, since=(0, 11, 2)
    ),
    # Without it a graph's parts may overlap; nothing in these does, and pauses are longer: 4.10 ms at 1 row, with it
    # 3.96 (both before residual.contract_share).
    _Option("xla_gpu_command_buffer_scheduling_mode", "SERIALIZE", "gpu", True, most_rows=NCCL_ROWS),
    # Processes that share a program would tune a part of its products each and wait for one another's results.  Ours
    # compile in an order of their own, and not at all what lies in their caches: that could wait for ever.
    _Option("xla_gpu_shard_autotuning", False, "gpu", True),
    # XLA compiles and times dozens of Triton kernels for each product before it takes the fastest.  Of many rows each
    # try runs for milliseconds, one at a time whatever the number of cores: the 7 mixed programs of an 8B model took
    # 31 s by themselves (16 cores, H100, jax 0.11.2, 2026-11-23), and prefill is not slower without: 44,624 tokens/s
    # against 42,244 with, other changes included (same machine and day).
    _Option("xla_gpu_enable_triton_gemm", False, "gpu", least_rows=LIBRARY_ROWS),
)


def compiler_options(platform: str, num_devices: int = 1, rows: int = 0) -> dict[str, bool | str]:
    """Options of a program's compilation; XLA refuses names that it does not know.

    `num_devices` is how many devices the program spans, and `rows` how many rows of activations it multiplies.
    """
    return {
        option.name: option.value
        for option in _OPTIONS
        if option.platform == platform
        and option.since <= jax.__version_info__
        and (num_devices > 1 or not option.several_devices)
        and rows >= option.least_rows
        and (option.most_rows is None or rows <= option.most_rows)
    }
