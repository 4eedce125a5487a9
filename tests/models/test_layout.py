"""Layouts of any sizes over any number of devices: every number has its place, and nothing else is anywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import ExpertsConfig, ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.models.layout import Layout, plan_layout
from jaxserve.models.sharding import RULES, partition_spec
from tests.engine.tiny_engine import TINY

QKV = ("embed", "kv_heads", "group", "head_dim")
O = ("heads", "head_dim", "embed")  # noqa: E741  # the parameter's name
SMOLLM2 = replace(TINY, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536, vocab_size=49152)
LLAMA_8B = replace(
    TINY, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336, vocab_size=128256
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    kv_heads, group = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    experts = None
    if draw(st.booleans()):
        count = draw(st.integers(1, 9))
        experts = ExpertsConfig(count, 1, draw(st.integers(1, 40)), renormalize=True, layers=(True, True))
    config = replace(
        TINY,
        family="llama" if experts is None else "mixtral",
        num_kv_heads=kv_heads,
        num_heads=kv_heads * group,
        intermediate_size=draw(st.integers(1, 300)),
        vocab_size=draw(st.integers(1, 2000)),
        experts=experts,
    )
    parallel = experts is not None and draw(st.booleans())
    return plan_layout(config, draw(st.integers(1, 8)), expert_parallel=parallel)


def moved(layout: Layout, axes: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """The padded array, -1 where there is nothing."""
    out = np.full(layout.padded_shape(axes, value.shape), -1)
    for move in layout.moves(axes, value.shape):
        assert (out[move.target] == -1).all(), "two moves to one place"
        out[move.target] = value[move.source]
    return out


@given(layouts())
def test_every_query_head_stands_beside_its_key_and_value_once(layout: Layout) -> None:
    config = layout.config
    group = config.num_heads // config.num_kv_heads
    kv_heads = np.arange(config.num_kv_heads)[:, None]
    # Query head n is n, key head k is 1000 + k, value head k is 2000 + k.
    fused = np.concatenate([kv_heads * group + np.arange(group), 1000 + kv_heads, 2000 + kv_heads], axis=1)
    slots = moved(layout, QKV, fused[None, :, :, None])[0, :, :, 0]
    bias = moved(layout, QKV[1:], fused[..., None])[..., 0]
    assert np.array_equal(slots, bias)
    queries, keys, values = slots[:, :-2], slots[:, -2], slots[:, -1]
    assert sorted(queries[queries >= 0]) == list(range(config.num_heads))
    out = moved(layout, O, np.arange(config.num_heads)[:, None, None])[:, 0, 0]
    assert np.array_equal(out, queries.reshape(-1))
    for row, key, value in zip(queries, keys, values, strict=True):
        own = {head // group for head in row if head >= 0}
        assert own == ({key - 1000} if key >= 0 else set())
        assert value == (key + 1000 if key >= 0 else -1)


@given(layouts(), st.sampled_from(["vocab", "ffn", "expert", "expert_ffn", "expert_gate_up"]))
def test_other_dimensions_are_filled_up_behind_to_equal_shares(layout: Layout, axis: str) -> None:
    config, experts = layout.config, layout.config.experts
    sizes = {"vocab": config.vocab_size, "ffn": config.intermediate_size}
    if experts is not None:
        sizes |= {"expert": experts.num_experts, "expert_ffn": experts.intermediate_size}
        sizes["expert_gate_up"] = 2 * experts.intermediate_size
    if axis not in sizes:
        return
    padded = moved(layout, (axis, "embed"), np.arange(sizes[axis])[:, None])[:, 0]
    assert np.array_equal(padded[: sizes[axis]], np.arange(sizes[axis]))
    assert (padded[sizes[axis] :] == -1).all()
    parts = {"tensor": layout.tensor, "expert": layout.expert}
    assert len(padded) % int(np.prod([parts[mesh_axis] for mesh_axis in RULES[axis]])) == 0


@given(layouts())
def test_the_local_model_is_a_share_of_the_padded_one(layout: Layout) -> None:
    config, local, count = layout.config, layout.local, layout.num_devices
    whole = (7, config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_dim)
    padded = layout.padded_shape(QKV, whole)
    assert padded[1] == count * local.num_kv_heads
    assert padded[2] == local.num_heads // local.num_kv_heads + 2
    assert layout.padded_shape(O, (config.num_heads, 8, 7))[0] == count * local.num_heads
    assert layout.padded_shape(("ffn",), (config.intermediate_size,)) == (count * local.intermediate_size,)
    assert layout.padded_shape(("vocab",), (config.vocab_size,)) == (layout.vocab_size,)
    assert layout.vocab_size == count * local.vocab_size
    if count == 1:
        assert local == config


@pytest.mark.parametrize(
    ("config", "devices", "copies", "slots", "group"),
    [
        (LLAMA_8B, 4, 1, 2, 4),
        (LLAMA_8B, 8, 1, 1, 4),
        (replace(LLAMA_8B, num_kv_heads=2, num_heads=16), 4, 2, 1, 4),
        (SMOLLM2, 2, 1, 2, 3),  # one of the four is empty
        (SMOLLM2, 4, 1, 1, 3),
        (SMOLLM2, 8, 2, 1, 2),
        (replace(TINY, num_heads=14, num_kv_heads=2), 4, 2, 1, 4),
        (replace(TINY, num_heads=14, num_kv_heads=2), 8, 4, 1, 2),
    ],
)
def test_devices_have_as_little_to_do_as_can_be(
    config: ModelConfig, devices: int, copies: int, slots: int, group: int
) -> None:
    layout = plan_layout(config, devices)
    assert (layout.kv_copies, layout.num_slots // devices, layout.slot_group) == (copies, slots, group)


def test_what_divides_evenly_is_neither_padded_nor_moved() -> None:
    layout = plan_layout(LLAMA_8B, 4)
    shape = (4096, 8, 6, 128)
    (move,) = layout.moves(QKV, shape)
    assert layout.padded_shape(QKV, shape) == shape
    assert move.source == move.target == tuple(slice(0, size) for size in shape)
    assert layout.vocab_size == LLAMA_8B.vocab_size


def test_one_mesh_axis_cannot_divide_two_dimensions() -> None:
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.odd: mesh axis 'expert' would divide both 'expert' and 'ffn'"
    ):
        partition_spec(("expert", "embed", "ffn"), "layers.0.mlp.odd")
    with pytest.raises(ConfigError, match="no rule says where its dimension 'depth' lies"):
        partition_spec(("depth",), "odd")


def test_experts_cannot_be_laid_out_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="enable_expert_parallel: a model of family 'llama' has no experts"):
        plan_layout(TINY, 4, expert_parallel=True)
