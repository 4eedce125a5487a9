"""What a program becomes for an accelerator that is not here: lowered modules, and the Triton code in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

DEVICES = {
    "cuda": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    "tpu": AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"),
}


def lower_for(platform: str, function: Callable[..., Any], *args: Any) -> jax.stages.Lowered:
    """`function` of arrays or shapes, jitted, lowered for "cuda" or "tpu"."""
    mesh = AbstractMesh((1,), ("x",), abstract_device=DEVICES[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))


def triton_kernels(lowered: jax.stages.Lowered) -> dict[str, str]:
    """The Triton IR of each kernel of a program lowered for CUDA, by the kernel's name."""
    module: Any = lowered.compiler_ir()
    kernels = {}
    with ir.Context() as context:
        triton_dialect.register_dialect(context)
        context.allow_unregistered_dialects = True  # thread barriers are of another
        for operation in _operations(module.operation):
            config = _backend_config(operation)
            if config is not None and "ir" in config:
                parsed = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
                kernels[ir.StringAttr(config["name"]).value] = str(parsed)
    return kernels


def _backend_config(operation: Any) -> Any:
    if operation.name != "stablehlo.custom_call" or "mhlo.backend_config" not in operation.attributes:
        return None
    return operation.attributes["mhlo.backend_config"]


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)
