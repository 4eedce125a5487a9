"""Weight tables are strict both ways and put every number where it belongs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import progress as progress_module
from jaxserve.errors import CheckpointError
from jaxserve.loading.weights import load_model, load_weights
from jaxserve.models.parameters import abstract_model
from jaxserve.models.registry import family_of
from tests.models.golden import MemoryCheckpoint, read_golden

DTYPE = jnp.dtype("float32")


@pytest.fixture
def untied() -> MemoryCheckpoint:
    return read_golden("llama").checkpoint


@pytest.fixture
def tied() -> MemoryCheckpoint:
    return read_golden("qwen3").checkpoint


def refusal(checkpoint: MemoryCheckpoint) -> str:
    """The error of loading it; nothing may be read before it is raised."""

    class Unread(MemoryCheckpoint):
        def read(self, name: str) -> np.ndarray:
            raise AssertionError(f"{name} was read")

    with pytest.raises(CheckpointError) as error:
        load_model(Unread(checkpoint.config, checkpoint.weights), DTYPE, progress=False)
    return str(error.value)


def test_missing_tensor_is_named(untied: MemoryCheckpoint) -> None:
    del untied.weights["model.layers.1.mlp.up_proj.weight"]
    assert refusal(untied) == (
        "in memory: does not fit its own config: "
        "tensors that the model needs are missing (1): model.layers.1.mlp.up_proj.weight"
    )


def test_left_over_tensor_is_named(untied: MemoryCheckpoint) -> None:
    untied.weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    assert "has no place for (1): model.layers.0.self_attn.q_proj.bias" in refusal(untied)


def test_tensor_of_another_shape_is_named(untied: MemoryCheckpoint) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    untied.weights[name] = untied.weights[name].T
    assert f"{name} is [32, 16], not [16, 32]" in refusal(untied)


def test_all_problems_are_told_and_long_lists_cut(untied: MemoryCheckpoint) -> None:
    untied.weights = {f"other.{i}": np.zeros(1, np.float32) for i in range(20)}
    message = refusal(untied)
    assert "needs are missing (30): " in message
    assert ", and 22 more" in message
    assert "has no place for (20): other.0" in message


def test_untied_head_is_needed(untied: MemoryCheckpoint) -> None:
    del untied.weights["lm_head.weight"]
    assert "missing (1): lm_head.weight" in refusal(untied)


def test_tied_head_that_was_written_out_is_accepted(tied: MemoryCheckpoint) -> None:
    tied.weights["lm_head.weight"] = tied.weights["model.embed_tokens.weight"]
    _, state = load_model(tied, DTYPE, progress=False)
    assert "lm_head" not in state


def test_tied_head_that_differs_is_refused(tied: MemoryCheckpoint) -> None:
    tied.weights["lm_head.weight"] = tied.weights["model.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight to model.embed_tokens.weight.*differ"):
        load_model(tied, DTYPE, progress=False)


def test_tied_head_of_another_shape_is_refused(tied: MemoryCheckpoint) -> None:
    tied.weights["lm_head.weight"] = np.zeros((5, 5), np.float32)
    assert "lm_head.weight is [5, 5], not [72, 32]" in refusal(tied)


def test_saved_rotary_frequencies_are_no_weights(untied: MemoryCheckpoint) -> None:
    untied.weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    load_model(untied, DTYPE, progress=False)
    untied.weights["model.layers.0.self_attn.rotary_emb.scale"] = np.zeros(4, np.float32)
    assert "rotary_emb.scale" in refusal(untied)


def test_an_error_while_reading_reaches_the_caller(untied: MemoryCheckpoint) -> None:
    class Torn(MemoryCheckpoint):
        def read(self, name: str) -> np.ndarray:
            if name == "model.norm.weight":
                raise CheckpointError("torn")
            return super().read(name)

    with pytest.raises(CheckpointError, match="torn"):
        load_model(Torn(untied.config, untied.weights), DTYPE, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fused_weights_hold_the_heads_in_order(dtype: str) -> None:
    checkpoint = read_golden("qwen2_yarn").checkpoint
    config = checkpoint.config
    model = nnx.merge(*load_model(checkpoint, jnp.dtype(dtype), progress=False))
    attention, mlp = model.layers[1].attention, model.layers[1].mlp
    group = config.num_heads // config.num_kv_heads

    def expected(name: str) -> np.ndarray:
        return np.asarray(jnp.asarray(checkpoint.weights[f"model.layers.1.{name}"], dtype))

    for kind in ("weight", "bias"):
        fused = attention.qkv if kind == "weight" else attention.qkv_bias
        assert fused is not None
        assert fused[...].dtype == jnp.dtype(dtype)
        q, k, v = (
            expected(f"self_attn.{part}_proj.{kind}").reshape(-1, config.head_dim, *fused.shape[:-3])
            for part in "qkv"
        )
        for head in range(config.num_heads):
            np.testing.assert_array_equal(fused[..., head // group, head % group, :].T, q[head])
        for head in range(config.num_kv_heads):
            np.testing.assert_array_equal(fused[..., head, group, :].T, k[head])
            np.testing.assert_array_equal(fused[..., head, group + 1, :].T, v[head])
    for part in range(2):
        name = ("gate_proj", "up_proj")[part]
        np.testing.assert_array_equal(mlp.gate_up[:, part].T, expected(f"mlp.{name}.weight"))
    o = expected("self_attn.o_proj.weight").reshape(config.hidden_size, config.num_heads, config.head_dim)
    np.testing.assert_array_equal(attention.o[...], np.moveaxis(o, 0, -1))


@pytest.mark.parametrize(
    ("name", "block", "parts"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_are_stacked_in_order(name: str, block: str, parts: tuple[str, str, str]) -> None:
    checkpoint = read_golden(name).checkpoint
    model = nnx.merge(*load_model(checkpoint, DTYPE, progress=False))
    mlp = model.layers[1].mlp
    weights = {
        key.removeprefix(f"model.layers.1.{block}."): value for key, value in checkpoint.weights.items()
    }
    np.testing.assert_array_equal(mlp.router[...].T, weights["gate.weight"])
    for expert in range(mlp.expert_down.shape[0]):
        gate, up, down = (weights[f"experts.{expert}.{part}.weight"] for part in parts)
        np.testing.assert_array_equal(mlp.expert_gate_up[expert, :, 0::2].T, gate)
        np.testing.assert_array_equal(mlp.expert_gate_up[expert, :, 1::2].T, up)
        np.testing.assert_array_equal(mlp.expert_down[expert].T, down)


def test_missing_and_surplus_experts_are_named() -> None:
    checkpoint = read_golden("mixtral").checkpoint
    surplus = "model.layers.0.block_sparse_moe.experts.4.w1.weight"
    missing = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    checkpoint.weights[surplus] = checkpoint.weights["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    del checkpoint.weights[missing]
    message = refusal(checkpoint)
    assert f"are missing (1): {missing}" in message
    assert f"has no place for (1): {surplus}" in message


def test_place_gets_every_parameter_in_its_dtype(untied: MemoryCheckpoint) -> None:
    _, abstract = abstract_model(untied.config, jnp.dtype("bfloat16"))
    placed: dict[tuple[str | int, ...], np.dtype] = {}

    def place(path: tuple[str | int, ...], value: np.ndarray) -> jax.Array:
        placed[path] = value.dtype
        return jnp.array(value)

    table = family_of(untied.config).weights(untied.config)
    load_weights(abstract, table, untied.read, untied.tensors, where="here", place=place, progress=False)
    assert placed == {path: jnp.dtype("bfloat16") for path, _ in nnx.to_flat_state(abstract)}


def test_parameters_do_not_alias_the_file(untied: MemoryCheckpoint) -> None:
    untied.weights = {name: value.astype(np.float32) for name, value in untied.weights.items()}
    graphdef, state = load_model(untied, DTYPE, progress=False)
    model = nnx.merge(graphdef, state)
    before = np.array(model.embedding[...])
    untied.weights["model.embed_tokens.weight"][:] = 0
    np.testing.assert_array_equal(model.embedding[...], before)


def test_progress_goes_to_stderr(
    untied: MemoryCheckpoint, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    load_model(untied, DTYPE, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading weights: " in err
