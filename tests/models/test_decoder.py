"""What holds for every family: axes on parameters, shapes without allocation, tied heads, refused configs."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.config import ExpertsConfig, ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.models.experts import ExpertsMLP
from jaxserve.models.parameters import abstract_model, dummy_model
from jaxserve.models.registry import build_model
from tests.models.golden import NAMES, read_golden

KNOWN_AXES = {"vocab", "embed", "heads", "kv_heads", "group", "head_dim", "gate_up", "ffn"}
KNOWN_AXES |= {"routes", "expert", "expert_ffn", "expert_gate_up"}
DTYPE = jnp.dtype("float32")


def config_of(name: str) -> ModelConfig:
    return read_golden(name).checkpoint.config


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_names_its_axes(name: str) -> None:
    _, state = abstract_model(config_of(name), DTYPE)
    parameters = nnx.to_flat_state(state)
    assert len(parameters) > 0
    for path, parameter in parameters:
        axes = parameter.get_metadata()["axes"]
        assert len(axes) == len(parameter.shape), path
        assert set(axes) <= KNOWN_AXES, path


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_axes_survive_loading(name: str) -> None:
    config = config_of(name)
    _, abstract = abstract_model(config, DTYPE)
    _, state = dummy_model(config, DTYPE, seed=0)
    expected = {path: value.get_metadata()["axes"] for path, value in nnx.to_flat_state(abstract)}
    assert {path: value.get_metadata()["axes"] for path, value in nnx.to_flat_state(state)} == expected


@pytest.mark.parametrize("name", ["llama3_rope", "qwen3_moe_mixed"])
def test_axes_tell_sizes(name: str) -> None:
    """An axis of one name has one size throughout the model, or laying a mesh over it would be wrong."""
    config = config_of(name)
    sizes: dict[str, set[int]] = {}
    for _, parameter in nnx.to_flat_state(abstract_model(config, DTYPE)[1]):
        for axis, size in zip(parameter.get_metadata()["axes"], parameter.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
    expected = {
        "vocab": {config.vocab_size},
        "embed": {config.hidden_size},
        "heads": {config.num_heads},
        "kv_heads": {config.num_kv_heads},
        "group": {config.num_heads // config.num_kv_heads + 2},
        "head_dim": {config.head_dim},
        "gate_up": {2},
        "ffn": {config.intermediate_size},
    }
    if config.experts is not None:
        count, ffn = config.experts.num_experts, config.experts.intermediate_size
        expected |= {"expert": {count}, "routes": {count}, "expert_ffn": {ffn}, "expert_gate_up": {2 * ffn}}
    assert sizes == expected


def test_layers_with_and_without_experts() -> None:
    model = nnx.merge(*dummy_model(config_of("qwen3_moe_mixed"), DTYPE, seed=0))
    assert [isinstance(layer.mlp, ExpertsMLP) for layer in model.layers] == [False, True, False, False]


def test_shapes_of_a_large_model_cost_no_memory() -> None:
    config = replace(
        config_of("llama"),
        num_layers=2,
        layer_windows=(None, None),
        hidden_size=65_536,
        intermediate_size=524_288,
        vocab_size=1_048_576,
    )
    _, state = abstract_model(config, jnp.dtype("bfloat16"))
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) > 2**37


def test_tied_head_has_no_weight_of_its_own() -> None:
    tied, untied = config_of("qwen3"), replace(config_of("qwen3"), tie_word_embeddings=False)
    assert {path for path, _ in nnx.to_flat_state(abstract_model(untied, DTYPE)[1])} - {
        path for path, _ in nnx.to_flat_state(abstract_model(tied, DTYPE)[1])
    } == {("lm_head",)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_tied_and_untied_agree(dtype: str) -> None:
    config = config_of("qwen3")
    tied = nnx.merge(*dummy_model(config, jnp.dtype(dtype), seed=1))
    untied = nnx.merge(*dummy_model(replace(config, tie_word_embeddings=False), jnp.dtype(dtype), seed=1))
    assert untied.lm_head is not None
    untied.lm_head[...] = tied.embedding[...].T
    hidden = jax.random.normal(jax.random.key(0), (3, config.hidden_size), dtype)
    logits = tied.logits(hidden)
    assert logits.shape == (3, config.vocab_size)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, untied.logits(hidden), atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("rows", [(3, 0), (5, 1, 1, 2, 0, 0, 0)])  # fewer than there are tokens, and more
def test_rows_that_are_asked_for_are_those_of_a_whole_pass(rows: tuple[int, ...], name: str) -> None:
    config = config_of(name)
    model = nnx.merge(*dummy_model(config, DTYPE, seed=1))
    tokens, pages = jnp.arange(6), (jnp.zeros((2, 8, config.num_kv_heads, 2, config.head_dim)),)
    pages *= config.num_layers
    meta = AttentionMetadata(
        positions=jnp.arange(6),
        token_rows=jnp.zeros(6, jnp.int32),
        page_table=jnp.ones((1, 1), jnp.int32),
        kv_lens=jnp.asarray([6]),
        query_starts=jnp.asarray([0, 6]),
        tile_rows=jnp.zeros(1, jnp.int32),
        tile_starts=jnp.zeros(1, jnp.int32),
        num_tiles=jnp.int32(1),
        kind="mixed",
        tile_size=6,
    )
    hidden, written = model(tokens, pages, meta)
    some, written_by_some = model(tokens, pages, meta, jnp.asarray(rows))
    np.testing.assert_allclose(some, hidden[jnp.asarray(rows)], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, written_by_some, written)


EXPERTS = ExpertsConfig(
    num_experts=2, num_per_token=1, intermediate_size=8, renormalize=True, layers=(True,) * 3
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_per_token": 3}, "3 experts a token, but there are 2"),
        ({"num_per_token": 0}, "num_per_token is 0; it must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
    ],
)
def test_impossible_experts_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(EXPERTS, **change)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="'gpt2' is unknown; known families: llama, mistral, qwen2, qwen3"):
        build_model(replace(config_of("llama"), family="gpt2"), DTYPE)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"qk_norm": True}, "qk_norm is True; in family 'llama' it is False"),
        ("llama", {"layer_windows": (None, 4, None)}, "family 'llama' has no windows"),
        ("mistral_full", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen2_yarn", {"qkv_bias": False}, "qkv_bias is False; in family 'qwen2' it is True"),
        ("qwen3", {"qk_norm": False}, "qk_norm is False"),
        ("mixtral", {"experts": None}, "experts is None; family 'mixtral' cannot do without"),
        ("qwen3", {"experts": EXPERTS}, "family 'qwen3' has none"),
    ],
)
def test_what_a_family_does_not_have_is_refused(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(replace(config_of(name), **change), DTYPE)
