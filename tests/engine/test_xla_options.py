"""The options are ones that the installed XLA knows: it refuses the others, and the engine would not start."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxserve.engine.xla_options import LIBRARY_ROWS, NCCL_ROWS, compiler_options


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("rows", [0, LIBRARY_ROWS, NCCL_ROWS + 1])
def test_xla_takes_the_options(platform: str, num_devices: int, rows: int) -> None:
    # XLA reads every platform's options on every platform.
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), np.float32))
    compiled = lowered.compile(compiler_options(platform, num_devices, rows))
    assert compiled(np.ones(3, np.float32)).tolist() == [2, 2, 2]


def test_graphs_hold_collectives_only_where_there_are_small_ones() -> None:
    assert "COLLECTIVES" in str(compiler_options("gpu", 8, NCCL_ROWS)["xla_gpu_enable_command_buffer"])
    assert "xla_gpu_enable_command_buffer" not in compiler_options("gpu", 8, NCCL_ROWS + 1)
    assert "xla_gpu_enable_command_buffer" not in compiler_options("gpu", 1)
    assert compiler_options("cpu", 1)


def test_only_products_of_many_rows_are_left_to_the_library() -> None:
    name = "xla_gpu_enable_triton_gemm"
    assert name not in compiler_options("gpu", rows=LIBRARY_ROWS - 1)
    assert compiler_options("gpu", rows=LIBRARY_ROWS)[name] is False
    assert name not in compiler_options("cpu", rows=LIBRARY_ROWS)


def test_small_sums_over_devices_go_into_the_graph() -> None:
    name = "xla_gpu_command_buffer_scheduling_mode"
    assert compiler_options("gpu", 2, NCCL_ROWS)[name] == "SERIALIZE"
    assert name not in compiler_options("gpu", 2, NCCL_ROWS + 1)
    assert name not in compiler_options("gpu", 1, NCCL_ROWS)


def test_no_host_waits_for_another_to_tune_kernels() -> None:
    name = "xla_gpu_shard_autotuning"
    assert all(compiler_options("gpu", 2, rows)[name] is False for rows in (0, NCCL_ROWS, NCCL_ROWS + 1))
    assert name not in compiler_options("gpu", 1)
