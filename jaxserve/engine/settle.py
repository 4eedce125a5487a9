"""From what the operator said to what the engine does: every open choice is made here, from model and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.devices import find_devices
from jaxserve.engine.lattice import Lattice, build_lattice
from jaxserve.engine.memory_plan import MemoryPlan, available_bytes, plan_memory
from jaxserve.engine.tower_lattice import TowerSettings, settle_tower
from jaxserve.errors import ConfigError
from jaxserve.models.layout import Layout, plan_layout

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


_PAGE_SIZE = 16
_MIN_MULTIPROCESSORS = 64  # with fewer, the larger budget's memory traffic counts more
# Models up to here have bursts as one program.  An H100 decodes Llama 1B in 1.2 ms a step, and whether a host's two
# calls a step keep up with that depends on who else uses its processors: 1.20, 1.64 and 1.97 ms a step in three runs,
# and 1.19 in all with bursts as one program, for 10 s more of compiling (jax 0.11.2, 2026-11-25).
_BURST_HIDDEN_SIZE = 2048
_GPU_PAGE_SIZE = 64  # the Hopper kernel fetches page by page: of small ones it spends its time asking
_KV_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything decided: what the runner compiles and the scheduler plans with."""

    model: ModelConfig
    layout: Layout  # of the model over the engine's devices
    dtype: str
    kv_dtype: str  # of KV pages
    platform: str
    device_kind: str
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logprobs: int
    memory: MemoryPlan
    lattice: Lattice
    tower: TowerSettings | None  # of models that see


def settle(
    config: EngineConfig,
    model: ModelConfig,
    weights_bytes: int,
    devices: Sequence[Device] | None = None,
    processor: ImageProcessorConfig | None = None,
) -> Settings:
    """Decide dtype, lengths, batch sizes and pages; ConfigError if the model does not fit, with the bytes it needs.

    `weights_bytes` are the bytes of a device's parameters at four bytes a number; `devices` are the engine's, or if
    nothing is said like the first one there is.  A model that sees needs a `processor`.
    """
    device = (devices or find_devices(config))[0]
    layout = layout_of(config, model)
    on_cpu = device.platform == "cpu"
    dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={max_model_len}: the model was made for at most {model.max_position_embeddings} tokens"
        )
    max_num_seqs = config.max_num_seqs or (32 if on_cpu else 256)
    max_num_batched_tokens = config.max_num_batched_tokens or max(_token_budget(device), max_num_seqs)
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={max_num_batched_tokens}: must be at least max_num_seqs ({max_num_seqs}), "
            "since every running sequence takes one token a step"
        )
    kv_dtype = _KV_DTYPES.get(config.kv_cache_dtype, dtype)
    page_size = config.page_size or (_GPU_PAGE_SIZE if device.platform == "gpu" else _PAGE_SIZE)
    tower = None
    if model.vision is not None:
        assert processor is not None, "a model that sees comes with how images are prepared for it"
        tower = settle_tower(
            model.vision,
            processor,
            max_pixels=_max_pixels(config),
            max_model_len=max_model_len,
            platform=device.platform,
        )
    memory = plan_memory(
        config,
        layout.local,
        tower=tower,
        page_size=page_size,
        available=available_bytes(config, device),
        weights=weights_bytes * jnp.dtype(dtype).itemsize // 4,
        itemsize=jnp.dtype(dtype).itemsize,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        platform=device.platform,
    )
    return Settings(
        model=model,
        layout=layout,
        dtype=dtype,
        kv_dtype=kv_dtype,
        platform=device.platform,
        device_kind=device.device_kind,
        page_size=page_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_logprobs=config.max_logprobs,
        memory=memory,
        lattice=build_lattice(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            page_size=page_size,
            platform=device.platform,
            hidden_size=model.hidden_size,
            tile_size=_tile_size(layout.local, dtype, device.platform),
            has_bursts=not on_cpu and _has_short_steps(layout),
            has_images=tower is not None,
        ),
        tower=tower,
    )


def with_pages(settings: Settings, num_pages: int) -> Settings:
    """The same with as many KV pages as fit everywhere: programs are of an exact number."""
    return replace(settings, memory=replace(settings.memory, num_pages=num_pages))


def _token_budget(device: Device) -> int:
    """Tokens of a step unless the operator says otherwise.

    On GPUs 64 for each multiprocessor, about 8192: products of so many rows come out at whole rounds of tiles.  On an
    H100 (132), Llama 8B makes 6,929 tokens/s of 256 x (512 in, 128 out) with 8448, and 6,825 with 8192; a prompt
    longer than that is not faster (jax 0.11.2, 2026-11-25).
    """
    if device.platform == "cpu":
        return 256
    num_cores = getattr(device, "core_count", None) if device.platform == "gpu" else None
    return 8192 if not num_cores or num_cores < _MIN_MULTIPROCESSORS else 64 * num_cores


def _has_short_steps(layout: Layout) -> bool:
    """Whether a decode step of few sequences may be over before the host has asked for the next one."""
    model = layout.config
    is_small = model.hidden_size <= _BURST_HIDDEN_SIZE
    # Over several devices steps are shorter, and a call takes longer.
    return model.experts is None and (is_small or layout.num_devices > 1)


def layout_of(config: EngineConfig, model: ModelConfig) -> Layout:
    """How the operator wants the model laid over devices."""
    return plan_layout(model, config.tensor_parallel_size, expert_parallel=config.enable_expert_parallel)


def _max_pixels(config: EngineConfig) -> int | None:
    """The operator's word on the largest image, if there is one."""
    kwargs = config.mm_processor_kwargs
    size = kwargs.get("size")
    value = kwargs.get("max_pixels", size.get("longest_edge") if isinstance(size, Mapping) else None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(
            f"mm_processor_kwargs: max_pixels must be a number of pixels, at least 1, got {value!r:.60}"
        )
    return value


def _tile_size(model: ModelConfig, dtype: str, platform: str) -> int:
    """Queries a tile of a mixed step, as the platform's attention wants them."""
    if platform != "gpu":
        return 32
    from jaxserve.kernels_pallas.gpu_prefill import tile_size

    return tile_size(model.num_heads, model.num_kv_heads, model.head_dim, dtype)
