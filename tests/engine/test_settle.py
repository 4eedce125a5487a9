"""What the engine decides about memory, on a machine whose memory the tests set."""

from __future__ import annotations

import os
from types import SimpleNamespace

import jax
import pytest
from jax._src import xla_bridge

from jaxserve.config import EngineConfig
from jaxserve.engine import memory_plan
from jaxserve.engine.building import weights_bytes
from jaxserve.engine.memory_plan import MemoryPlan
from jaxserve.engine.settle import Settings, settle
from jaxserve.errors import ConfigError
from tests.engine.tiny_engine import TINY

MIB = 2**20
PAGE = 2 * 8 * 2 * 2 * 8 * 4  # layers, tokens, kv heads, keys and values, head width, float32
FULL_LENGTH = 16 + 1  # pages of one sequence of 128 tokens, and the dummy page


def plan(monkeypatch: pytest.MonkeyPatch, free: int | None, **options: object) -> MemoryPlan:
    monkeypatch.setattr(memory_plan, "free_memory", lambda: free)
    config = EngineConfig(model="tiny", page_size=8, max_num_seqs=4, **options)  # type: ignore[arg-type]  # by name
    return settle(config, TINY, weights_bytes(TINY)).memory


def test_kv_memory_is_what_the_share_of_the_device_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    half = plan(monkeypatch, 1 * MIB, gpu_memory_utilization=0.5)
    assert half.available == MIB // 2
    assert half.total <= half.available
    assert half.total == half.weights + half.activations + half.sampler_state + half.kv_cache
    assert half.num_pages < plan(monkeypatch, 1 * MIB, gpu_memory_utilization=0.9).num_pages


def test_no_more_pages_than_all_sequences_can_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, 100 * MIB, kv_cache_memory=50 * MIB).num_pages == 4 * 16 + 1


def test_kv_cache_memory_overrides_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"kv_cache_memory": 20 * PAGE, "gpu_memory_utilization": 0.01}
    assert plan(monkeypatch, 2 * MIB, **options).num_pages == 20
    assert plan(monkeypatch, None, **options).num_pages == 20  # nor need the free memory be known


@pytest.mark.parametrize(
    ("free", "options", "says"),
    [
        (None, {}, "set kv_cache_memory"),
        (100 * MIB, {"kv_cache_memory": 1000}, f"raise kv_cache_memory to {FULL_LENGTH * PAGE}"),
        (100_000, {}, "too little memory: the model needs"),
        (100_000, {"kv_cache_memory": 40 * PAGE}, "too little memory: the model needs"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, free: int | None, options: dict[str, int], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(monkeypatch, free, **options)


def test_more_kv_memory_than_there_is_is_refused_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan(monkeypatch, 100 * MIB)
    room = 30 * PAGE
    with pytest.raises(ConfigError, match=f"lower it to at most {room}"):
        plan(monkeypatch, memory.total - memory.kv_cache + room, kv_cache_memory=40 * PAGE)


POOL_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def settle_on(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    device_bytes: int,
    *,
    running: bool = False,
    **options: object,
) -> Settings:
    """Settings for a pretend accelerator, whose allocator takes the share that the environment says, as JAX's does."""
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: running)

    def devices() -> list[SimpleNamespace]:
        share = float(next((text for name in POOL_SHARES if (text := os.environ.get(name))), 0.75))
        stats = {"bytes_limit": int(device_bytes * share)}
        return [SimpleNamespace(platform=platform, device_kind="pretend", memory_stats=lambda: stats)]

    monkeypatch.setattr(jax, "devices", devices)
    settings: dict[str, object] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "page_size": 8, **options}
    config = EngineConfig(model="tiny", **settings)  # type: ignore[arg-type]  # by name
    return settle(config, TINY, weights_bytes(TINY))


def plan_on_gpu(monkeypatch: pytest.MonkeyPatch, device_bytes: int, **options: object) -> MemoryPlan:
    return settle_on(monkeypatch, "gpu", device_bytes, **options).memory  # type: ignore[arg-type]  # by name


@pytest.fixture
def no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has said what the allocator may take, and what the engine says is forgotten afterwards."""
    for name in POOL_SHARES:
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("no_share")
def test_the_share_is_of_the_device_and_not_of_the_allocators_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan_on_gpu(monkeypatch, 100 * MIB, gpu_memory_utilization=0.9)
    assert memory.available == 90 * MIB


@pytest.mark.usefixtures("no_share")
def test_a_pool_that_exists_already_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_on_gpu(monkeypatch, 100 * MIB, running=True).available == 75 * MIB
    half = plan_on_gpu(monkeypatch, 100 * MIB, running=True, gpu_memory_utilization=0.5)
    assert half.available == 50 * MIB


@pytest.mark.usefixtures("no_share")
@pytest.mark.parametrize("name", POOL_SHARES)
def test_the_operators_pool_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0.5")
    assert plan_on_gpu(monkeypatch, 100 * MIB, gpu_memory_utilization=0.9).available == 50 * MIB
    assert [os.environ[other] for other in POOL_SHARES if other != name] == [""]


@pytest.mark.usefixtures("no_share")
def test_kv_cache_memory_overrides_the_share_of_an_accelerator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan_on_gpu(monkeypatch, 2 * MIB, gpu_memory_utilization=0.01, kv_cache_memory=20 * PAGE // 2)
    assert memory.num_pages == 20  # bfloat16


@pytest.mark.usefixtures("no_share")
@pytest.mark.parametrize(("platform", "tokens"), [("gpu", 64), ("tpu", 16)])
def test_pages_are_larger_on_gpus_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, platform: str, tokens: int
) -> None:
    settings = settle_on(monkeypatch, platform, 100 * MIB, page_size=None)
    assert settings.page_size == tokens
    assert settings.lattice.max_pages == 128 // tokens
    assert settings.memory.page == PAGE // 8 * tokens // 2  # bfloat16
    assert settle_on(monkeypatch, platform, 100 * MIB, page_size=32).page_size == 32


@pytest.mark.usefixtures("no_share")
def test_a_little_of_an_accelerators_pool_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan_on_gpu(
        monkeypatch, 3 * MIB // 2, max_num_seqs=64, max_num_batched_tokens=64, max_model_len=128
    )
    free = memory.available - memory.total
    assert free >= memory.available // 64
    assert free <= memory.available // 64 + memory.page * (1 + memory.num_pages // 128)


def test_the_samplers_state_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan(monkeypatch, 100 * MIB)
    slots = 4 + 1
    assert memory.sampler_state >= slots * TINY.vocab_size * 4
    assert plan(monkeypatch, memory.total).num_pages < memory.num_pages


@pytest.mark.parametrize(
    ("asked", "kv_dtype", "page_bytes"),
    [
        ("auto", "bfloat16", PAGE // 2),
        ("float16", "float16", PAGE // 2),
        ("fp8", "float8_e4m3fn", PAGE // 4),
        ("fp8_e4m3", "float8_e4m3fn", PAGE // 4),
        ("fp8_e5m2", "float8_e5m2", PAGE // 4),
    ],
)
def test_pages_have_the_dtype_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, kv_dtype: str, page_bytes: int
) -> None:
    settings = settle_on(monkeypatch, "gpu", 100 * MIB, kv_cache_dtype=asked, kv_cache_memory=20 * PAGE)
    assert (settings.dtype, settings.kv_dtype) == ("bfloat16", kv_dtype)
    assert settings.memory.page == page_bytes
    assert settings.memory.num_pages == min(20 * PAGE // page_bytes, 4 * 16 + 1)


def test_a_gpu_gets_no_pages_that_its_kernels_cannot_address(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """32-bit offsets, with a sign, up to 4 GiB of one layer's pages: 8-bit pages end at 2 GiB, or begin at 4."""

    def num_pages(gib: float, kv_cache_dtype: str = "auto") -> int:
        settings = settle_on(
            monkeypatch,
            "gpu",
            2**50,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory=int(gib * 2 * 2**30),
            max_num_seqs=2**22,
            max_num_batched_tokens=2**22,
        )
        return settings.memory.num_pages

    page = 8 * 2 * 2 * 8  # numbers of a page in one of the two layers
    assert num_pages(1.9, "fp8") == int(1.9 * 2**30) // page
    assert num_pages(3, "fp8") == 2**31 // page
    assert "2 GiB a layer of float8_e4m3fn" in caplog.text
    assert num_pages(5, "fp8") == 5 * 2**30 // page
    assert num_pages(3) == 3 * 2**30 // (2 * page)
