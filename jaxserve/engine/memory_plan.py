"""What an engine takes of a device's memory, and how many KV pages there is room for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.devices import pool_share
from jaxserve.engine.host_limits import free_memory
from jaxserve.engine.sampler_state import init_state
from jaxserve.engine.tower_lattice import TowerSettings, tower_bytes
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.pages import most_pages

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


logger = logging.getLogger(__name__)

_GIB = 2**30
_CPU_KV_DEFAULT = 1 * _GIB
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


def plan_memory(
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
    """Of one device, whose part of the model `model` is; `weights` are bytes, and so is what is `available`, if known.

    Raises ConfigError if there is no room for one sequence's pages, with the bytes it takes.
    """
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


def available_bytes(config: EngineConfig, device: Device) -> int | None:
    """What the engine may use of a device; None if that is unknown and kv_cache_memory makes it unnecessary to know."""
    if device.platform == "cpu":
        free = free_memory()
        sharing = config.tensor_parallel_size * config.data_parallel_size
        pool = device_bytes = None if free is None else free // sharing
    else:
        pool = (device.memory_stats() or {}).get("bytes_limit")
        device_bytes = None if pool is None else pool / pool_share()
    if config.kv_cache_memory is not None:
        return pool
    if pool is None or device_bytes is None:
        raise ConfigError(f"{device.device_kind} does not tell its memory; set kv_cache_memory")
    return min(pool, int(device_bytes * config.gpu_memory_utilization))


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


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB"
