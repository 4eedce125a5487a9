"""What the engine decides about memory, on a machine whose memory the tests set."""

from __future__ import annotations

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import settle as settle_module
from jaxserve.engine.client import weights_bytes
from jaxserve.engine.settle import MemoryPlan, settle
from jaxserve.errors import ConfigError
from tests.engine.tiny_engine import TINY

MIB = 2**20
PAGE = 2 * 8 * 2 * 2 * 8 * 4  # layers, tokens, kv heads, keys and values, head width, float32
FULL_LENGTH = 16 + 1  # pages of one sequence of 128 tokens, and the dummy page


def plan(monkeypatch: pytest.MonkeyPatch, free: int | None, **options: object) -> MemoryPlan:
    monkeypatch.setattr(settle_module, "_free_host_bytes", lambda: free)
    config = EngineConfig(model="tiny", page_size=8, max_num_seqs=4, **options)  # type: ignore[arg-type]  # by name
    return settle(config, TINY, weights_bytes(TINY)).memory


def test_kv_memory_is_what_the_share_of_the_device_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    half = plan(monkeypatch, 1 * MIB, gpu_memory_utilization=0.5)
    assert half.available == MIB // 2
    assert half.weights + half.activations + half.kv_cache <= half.available
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
        plan(monkeypatch, memory.weights + memory.activations + room, kv_cache_memory=40 * PAGE)
