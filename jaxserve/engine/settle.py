"""From what the operator said to what the engine does: every open choice is made here, from model and device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.devices import find_devices, pool_share
from jaxserve.engine.host_limits import free_memory
from jaxserve.engine.lattice import Lattice, build_lattice
from jaxserve.engine.sampler_state import init_state
from jaxserve.engine.tower_lattice import TowerSettings, settle_tower, tower_bytes
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.pages import most_pages
from jaxserve.models.layout import Layout, plan_layout

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


logger = logging.getLogger(__name__)

GIB = 2**30
_CPU_KV_DEFAULT = 1 * GIB
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
# Significant bits of an automatic page count: programs are compiled for an exact number.  What a CPU machine has free
# changes from start to start, an accelerator's pool does not.
_PAGE_COUNT_BITS = 6
_ACCELERATOR_PAGE_COUNT_BITS = 8
# Of an accelerator's pool, one part in so many stays free: loading leaves holes that nothing fits into.
_POOL_SLACK = 64


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device, which has a part of each page, and what the KV share amounts to."""

    available: int  # what the engine may use
    weights: int
    activations: int  # largest step, estimated
    sampler_state: int  # token counts and biases of every slot
    page: int  # one KV page over all layers
    num_pages: int  # the dummy page included
    image_cache: int = 0  # tokens of images, of models that see

    @property
    def kv_cache(self) -> int:
        return self.page * self.num_pages

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.sampler_state + self.image_cache + self.kv_cache


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
    memory = _plan_memory(
        config,
        layout.local,
        tower=tower,
        page_size=page_size,
        available=_available_bytes(config, device),
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


def _plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    *,
    tower: TowerSettings | None,
    page_size: int,
    available: int | None,
    weights: int,
    itemsize: int,
    kv_dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    platform: str,
) -> MemoryPlan:
    on_cpu = platform == "cpu"
    numbers = page_size * model.num_kv_heads * 2 * model.head_dim  # of one page in one layer
    page = model.num_layers * numbers * jnp.dtype(kv_dtype).itemsize
    # Live at once in the largest step: the residual stream, one MLP, hidden states; float32 logits and their copies.
    # The MLP counts as float32, as XLA may keep it: 8192 tokens of Llama 8B asked an H100 for 1.69 GiB a step, where
    # a compilation without tuning says 0.72 (jax 0.11.2, 2026-11-23).  This makes 2.18 GiB, and 1.43 of 1B.
    activations = max_num_batched_tokens * (
        _feed_forward_bytes(model, itemsize, is_fused=platform == "gpu") + 6 * model.hidden_size * itemsize
    )
    activations += max_num_seqs * model.vocab_size * 4 * 4
    # The page table, and a step's rows.
    activations += 2 * (max_num_seqs + 1) * -(-max_model_len // page_size) * 4
    state = jax.eval_shape(lambda: init_state(max_num_seqs, model.vocab_size))
    sampler_state = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state))
    image_cache = 0
    if tower is not None and model.vision is not None:
        image_cache = (tower.cache_rows + 1) * model.hidden_size * itemsize
        # The tower and a forward pass run one after the other.
        activations = max(activations, tower_bytes(model.vision, tower.lattice, itemsize))
    fixed = weights + activations + sampler_state + image_cache
    parts = (
        f"{_gib(weights)} for weights, {_gib(activations)} for a step, {_gib(sampler_state)} for the sampler"
    )
    if image_cache:
        parts += f", {_gib(image_cache)} for images"
    pages_of_one = -(-max_model_len // page_size) + 1  # and the dummy page
    useful = max_num_seqs * (pages_of_one - 1) + 1
    if available is None:
        assert config.kv_cache_memory is not None
        available = fixed + config.kv_cache_memory
    room = available - fixed - (0 if on_cpu else available // _POOL_SLACK)
    if config.kv_cache_memory is not None:
        asked = min(config.kv_cache_memory, useful * page)
        if asked > room >= pages_of_one * page:
            raise ConfigError(
                f"kv_cache_memory={config.kv_cache_memory}: with {parts}, "
                f"{_gib(room)} of {_gib(available)} are left for KV pages; lower it to at most {room}"
            )
        room = min(room, config.kv_cache_memory)
    elif on_cpu:
        room = min(room, max(_CPU_KV_DEFAULT // config.tensor_parallel_size, pages_of_one * page))
    num_pages = min(room // page, useful)
    if num_pages < pages_of_one:
        needed = pages_of_one * page
        if config.kv_cache_memory is not None and room == config.kv_cache_memory:
            holds = max(room // page - 1, 0) * page_size
            lower = f" or lower max_model_len to {holds}" if holds else ""
            raise ConfigError(
                f"kv_cache_memory={config.kv_cache_memory}: one sequence of max_model_len={max_model_len} tokens "
                f"needs {_gib(needed)} of KV pages; raise kv_cache_memory to {needed}{lower}"
            )
        raise ConfigError(
            f"too little memory: the model needs {parts} and "
            f"{_gib(needed)} of KV pages for one sequence of max_model_len={max_model_len} tokens, "
            f"{_gib(fixed + needed)} in all, and {_gib(available)} may be used; "
            "lower max_model_len, max_num_batched_tokens or max_num_seqs, or use a smaller dtype"
        )
    if platform == "gpu":
        holds, fails = most_pages(numbers, kv_dtype)
        if holds < num_pages <= fails:
            if holds < pages_of_one:
                raise ConfigError(
                    f"kv_cache_dtype={config.kv_cache_dtype!r}: one sequence of max_model_len={max_model_len} tokens "
                    "has between 2 and 4 GiB of KV pages in a layer, which the GPU's kernels cannot address; "
                    f"lower max_model_len to at most {(holds - 1) * page_size}, or use bfloat16"
                )
            logger.warning("KV pages are cut from %d to %d, 2 GiB a layer of %s", num_pages, holds, kv_dtype)
            num_pages = holds
    if config.kv_cache_memory is None:
        bits = _PAGE_COUNT_BITS if on_cpu else _ACCELERATOR_PAGE_COUNT_BITS
        num_pages = max(_round_down(num_pages, bits), pages_of_one)
    return MemoryPlan(available, weights, activations, sampler_state, page, num_pages, image_cache)


def _feed_forward_bytes(model: ModelConfig, itemsize: int, *, is_fused: bool) -> int:
    """What a token takes of the widest feed-forward there is."""
    dense, experts = 3 * model.intermediate_size * 4, model.experts
    if experts is None:
        return dense
    # Kernels that compute gate and up at once write their product alone, though with rows that fill up tiles.
    hidden = experts.intermediate_size * (2 * itemsize if is_fused else 3 * 4)
    sparse = experts.num_per_token * (hidden + 2 * model.hidden_size * itemsize)
    return sparse if all(experts.layers) else max(dense, sparse)


def _round_down(count: int, bits: int) -> int:
    """Drop the low bits, so that a little more or less free memory at the next start finds the same programs."""
    shift = max(count.bit_length() - bits, 0)
    return count >> shift << shift


def _available_bytes(config: EngineConfig, device: Device) -> int | None:
    """What the engine may use; None if that is unknown and kv_cache_memory makes it unnecessary to know."""
    if device.platform == "cpu":
        free = free_memory()
        pool = device_bytes = (
            None if free is None else free // config.tensor_parallel_size
        )  # which they share
    else:
        pool = (device.memory_stats() or {}).get("bytes_limit")
        device_bytes = None if pool is None else pool / pool_share()
    if config.kv_cache_memory is not None:
        return pool
    if pool is None or device_bytes is None:
        raise ConfigError(f"{device.device_kind} does not tell its memory; set kv_cache_memory")
    return min(pool, int(device_bytes * config.gpu_memory_utilization))


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
