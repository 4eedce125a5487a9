"""GGUF checkpoints: names, layout, block types and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import TensorInfo
from jaxserve.loading.fetch import FETCHABLE_MODELS, models_directory
from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint, hugging_face_name, unpermute_rows
from jaxserve.loading.weights import check_tensors
from jaxserve.models.registry import family_of
from tests.loading.builders import (
    EXPERT_FFN,
    EXPERTS,
    FFN,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    finish,
    gguf_expert_shapes,
    gguf_shapes,
    gguf_writer,
    hf_shapes,
    random_blocks,
    random_tensors,
    write_gguf,
)


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k, a row at a time: component j·H/2 + i becomes 2i + j."""
    half = len(weight) // num_heads // 2
    out = np.empty_like(weight)
    for head in range(num_heads):
        for i in range(half):
            for j in range(2):
                out[head * 2 * half + 2 * i + j] = weight[head * 2 * half + j * half + i]
    return out


@pytest.mark.parametrize("shape", [(HEADS * HEAD_DIM, 5), (HEADS * HEAD_DIM,), (HEADS * 2, 3)])
def test_unpermuting_undoes_the_permutation(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape)
    permuted = permute(weight, HEADS)
    assert np.array_equal(unpermute_rows(permuted, HEADS), weight)


def test_every_name_of_a_small_llama_is_mapped(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_tensors(gguf_shapes()))
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.tensors == {name: TensorInfo(shape, "F32") for name, shape in hf_shapes().items()}
    assert checkpoint.config.family == "llama"
    assert (checkpoint.config.num_layers, checkpoint.config.vocab_size) == (LAYERS, VOCAB)
    assert checkpoint.defaults.eos_token_ids == (2,)
    assert checkpoint.fields["tokenizer.ggml.tokens"][3] == "tokén3"


def test_llama_q_and_k_come_unpermuted_and_nothing_else_is_touched(tmp_path: Path) -> None:
    tensors = random_tensors(gguf_shapes())
    heads = {"attn_q.weight": HEADS, "attn_k.weight": KV_HEADS}
    stored = {}
    for name, tensor in tensors.items():
        num_heads = heads.get(name.split(".", 2)[-1])
        stored[name] = tensor if num_heads is None else permute(tensor, num_heads)
    write_gguf(tmp_path / "m.gguf", stored)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    for name, tensor in tensors.items():
        assert np.array_equal(checkpoint.read(hugging_face_name(name)), tensor), name


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_stand_as_they_are(tmp_path: Path, architecture: str) -> None:
    shapes = gguf_shapes(biases=architecture == "qwen2", qk_norm=architecture == "qwen3")
    tensors = random_tensors(shapes)
    write_gguf(tmp_path / "m.gguf", tensors, architecture)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.config.family == architecture
    assert len(checkpoint.tensors) == len(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(checkpoint.read(hugging_face_name(name)), tensor), name


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("blk.7.attn_q.bias", "model.layers.7.self_attn.q_proj.bias"),
        ("blk.12.attn_k_norm.weight", "model.layers.12.self_attn.k_norm.weight"),
        ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_exps.weight"),
        ("blk.0.attn_q.scale", "blk.0.attn_q.scale"),
        ("mystery", "mystery"),
    ],
)
def test_names_without_a_counterpart_stay_visible(gguf_name: str, name: str) -> None:
    assert hugging_face_name(gguf_name) == name


def write_mixed(path: Path, architecture: str) -> dict[str, np.ndarray]:
    """A model whose matrices are of all kinds of blocks, F16 and BF16 among them; gives the values."""
    kinds = [Kind.Q8_0, Kind.F16, Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS, Kind.Q5_0, Kind.BF16]
    writer = gguf_writer(path, architecture)
    values = {}
    for number, (name, shape) in enumerate(gguf_shapes().items()):
        kind = kinds[number % len(kinds)] if len(shape) == 2 else Kind.F32
        raw = random_blocks(shape, kind, seed=number)
        writer.add_tensor(name, raw, raw_dtype=kind)
        values[name] = gguf.dequantize(raw, kind).astype(np.float32)
    finish(writer)
    return values


def test_block_types_are_dequantised_from_several_threads(tmp_path: Path) -> None:
    values = write_mixed(tmp_path / "m.gguf", "qwen2")
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    kinds = {info.stored_as for info in checkpoint.tensors.values()}
    assert kinds == {"F16", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "BF16", "Q5_0", "F32"}
    names = list(values) * 3
    with ThreadPoolExecutor(4) as pool:
        for name, got in zip(
            names, pool.map(lambda n: checkpoint.read(hugging_face_name(n)), names), strict=True
        ):
            assert np.array_equal(got.astype(np.float32), values[name]), name


def test_quantised_q_and_k_are_unpermuted_too(tmp_path: Path) -> None:
    values = write_mixed(tmp_path / "m.gguf", "llama")
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    quantised = 0
    for layer in range(LAYERS):
        for letter, num_heads in (("q", HEADS), ("k", KV_HEADS)):
            name = f"blk.{layer}.attn_{letter}.weight"
            got = checkpoint.read(hugging_face_name(name))
            assert np.array_equal(permute(got.astype(np.float32), num_heads), values[name])
            quantised += "Q" in checkpoint.tensors[hugging_face_name(name)].stored_as
    assert quantised == 3


def test_plain_floats_are_views_of_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_tensors(gguf_shapes()))
    tensor = GGUFCheckpoint(tmp_path / "m.gguf").read("model.layers.0.mlp.up_proj.weight")
    assert not tensor.flags.owndata
    assert not tensor.flags.writeable
    assert tensor.flags.aligned


@pytest.mark.parametrize(
    ("architecture", "ffn", "block", "parts"),
    [
        ("llama", FFN, "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3moe", EXPERT_FFN, "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_stacked_experts_are_read_one_by_one(
    tmp_path: Path, architecture: str, ffn: int, block: str, parts: tuple[str, str, str]
) -> None:
    """Each with its own bytes, whatever kind of blocks they are stored as; and they are all that the model wants."""
    path = tmp_path / "m.gguf"
    writer = gguf_writer(path, architecture)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(ffn)
    shapes = gguf_expert_shapes(ffn)
    if architecture == "qwen3moe":
        shapes |= {f"blk.{n}.attn_{x}_norm.weight": (HEAD_DIM,) for n in range(LAYERS) for x in "qk"}
    values = {}
    for number, (name, shape) in enumerate(shapes.items()):
        kind = (Kind.Q8_0, Kind.Q4_K, Kind.Q6_K)[number % 3] if "exps" in name else Kind.F32
        raw = random_blocks(shape, kind, seed=number)
        writer.add_tensor(name, raw, raw_dtype=kind)
        values[name] = gguf.dequantize(raw, kind).astype(np.float32)
    finish(writer)
    checkpoint = GGUFCheckpoint(path)
    table = family_of(checkpoint.config).weights(checkpoint.config)
    check_tensors(table, checkpoint.tensors, "m.gguf")
    for layer in range(LAYERS):
        router = checkpoint.read(f"model.layers.{layer}.{block}.gate.weight")
        np.testing.assert_array_equal(router, values[f"blk.{layer}.ffn_gate_inp.weight"])
        for expert in range(EXPERTS):
            for part, stacked in zip(parts, ("gate", "up", "down"), strict=True):
                got = checkpoint.read(f"model.layers.{layer}.{block}.experts.{expert}.{part}.weight")
                np.testing.assert_array_equal(got, values[f"blk.{layer}.ffn_{stacked}_exps.weight"][expert])


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, random_tensors(gguf_shapes()))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(
        CheckpointError, match=rf"m\.gguf: truncated: expected {size} bytes, found {size // 2}"
    ):
        GGUFCheckpoint(path)


def test_unsupported_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_tensors(gguf_shapes()), "starcoder2")
    with pytest.raises(CheckpointError, match=r"m\.gguf.*starcoder2"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_unsupported_block_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf_writer(path)
    for name, tensor in random_tensors(gguf_shapes()).items():
        if name == "blk.1.ffn_up.weight":
            writer.add_tensor(name, random_blocks(tensor.shape, Kind.Q8_1), raw_dtype=Kind.Q8_1)
        else:
            writer.add_tensor(name, tensor)
    finish(writer)
    with pytest.raises(CheckpointError, match=r"'blk\.1\.ffn_up\.weight' is stored as Q8_1"):
        GGUFCheckpoint(path)


def test_part_of_a_split_file(tmp_path: Path) -> None:
    writer = gguf_writer(tmp_path / "m.gguf")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, WIDTH), np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match="one of 3 parts of a split GGUF"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def llama3_divisors(factor: float) -> np.ndarray:
    """What the small model's frequencies are divided by under Llama 3.1's scheme."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 10000.0 ** (2 * i / HEAD_DIM)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        divisors.append(
            1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else 1 if smooth >= 1 else factor
        )
    return np.array(divisors, np.float32)


def test_rope_factors_go_into_the_config_and_are_no_weight(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_tensors(gguf_shapes()) | {"rope_freqs.weight": llama3_divisors(8)})
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert set(checkpoint.tensors) == set(hf_shapes())
    assert checkpoint.config.rope_scaling is not None
    assert (checkpoint.config.rope_scaling.kind, checkpoint.config.rope_scaling.factor) == ("llama3", 8.0)


def test_rope_factors_in_half_precision(tmp_path: Path) -> None:
    factors = llama3_divisors(8).astype(np.float16)
    write_gguf(tmp_path / "m.gguf", random_tensors(gguf_shapes()) | {"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is stored as F16; it must be F32"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_q_of_a_shape_that_has_no_heads(tmp_path: Path) -> None:
    tensors = random_tensors(gguf_shapes() | {"blk.0.attn_q.weight": (HEADS * HEAD_DIM + 2, WIDTH)})
    write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.weight'.*does not divide into 4 heads"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_one_tensor_by_two_names(tmp_path: Path) -> None:
    tensors = random_tensors(gguf_shapes() | {"model.norm.weight": (WIDTH,)})
    write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(
        CheckpointError, match=r"'output_norm\.weight' and 'model\.norm\.weight' are the same"
    ):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: no such file"):
        GGUFCheckpoint(tmp_path / "nothing.gguf")


@pytest.mark.real_model
def test_real_smollm2_has_exactly_the_tensors_of_its_config() -> None:
    path = models_directory() / FETCHABLE_MODELS["smollm2"].file_name
    if not path.exists():
        pytest.skip(f"{path} is not there; `python -m jaxserve.loading.fetch smollm2` brings it")
    checkpoint = GGUFCheckpoint(path)
    config = checkpoint.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    outer = {"model.embed_tokens.weight", "model.norm.weight"}
    per_layer = {name.split("layers.0.")[1] for name in hf_shapes() if "layers.0." in name}
    assert set(checkpoint.tensors) == outer | {f"model.layers.{n}.{x}" for n in range(30) for x in per_layer}
    assert checkpoint.read("model.layers.29.self_attn.k_proj.weight").shape == (192, 576)
