"""`jaxserve plan` on a model that is nothing but a config."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jaxserve.cli.main import main
from tests.models.vision_cases import CONFIGS

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory", "1M", "--dtype", "float32")
    assert main(["plan", model, "--json", *flags, "-dp", "3"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # Embeddings, and per layer q, k, v, o, three of the MLP and two norms; one norm at the end; float32.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert plan["memory"]["weights"] == 4 * (320 * 64 + 3 * layer + 64)
    assert plan["kv"]["page_bytes"] == 3 * 16 * 2 * 2 * 16 * 4  # layers, tokens, K, keys and values, H, bytes
    assert plan["memory"]["kv_cache"] <= 2**20
    assert plan["kv"]["num_pages"] == plan["memory"]["kv_cache"] // plan["kv"]["page_bytes"] - 1
    assert plan["kv"]["num_tokens"] == plan["kv"]["num_pages"] * 16
    assert plan["max_num_seqs"] == 8
    assert plan["num_engines"] == 3  # none of whose devices need be here
    assert {"decode", "mixed"} == {shape["kind"] for shape in plan["lattice"]["forwards"]}
    forwards = {shape["name"] for shape in plan["lattice"]["forwards"]}
    assert forwards <= set(plan["programs"])
    assert plan["compile_seconds_estimate"] > 0
    assert plan["memory"]["total"] == sum(
        plan["memory"][part] for part in ("weights", "activations", "sampler_state", "kv_cache")
    )


def test_a_plan_for_several_devices_is_of_what_each_has(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--kv-cache-memory", "1M", "--dtype", "float32", "--tensor-parallel-size", "4")
    assert main(["plan", model, "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["devices"] == {"num_devices": 4, "tensor": 4, "expert": 1}
    # Two kv heads, each in two slots with one of its two query heads; 320 tokens fill up to 384.
    layer = 64 * 3 * 16 + 16 * 64 + 3 * 64 * 32 + 2 * 64
    assert plan["memory"]["weights"] == 4 * (384 // 4 * 64 + 3 * layer + 64)
    assert plan["kv"]["page_bytes"] == 3 * 16 * 1 * 2 * 16 * 4
    assert main(["plan", model, "-tp", "4", "--enable-expert-parallel"]) == 2
    assert "a model of family 'llama' has no experts" in capsys.readouterr().err


def test_tables(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model]) == 0
    out = capsys.readouterr().out
    assert "KV capacity" in out
    assert "programs to compile" in out
    assert "an estimate" in out
    assert out.count("mixed, scores prompts") == 1


def test_every_program_is_in_a_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model]) == 0
    out = capsys.readouterr().out
    programs = out[out.rindex("forward passes") :]
    *counts, total = map(int, re.findall(r"(\d+)(?: │$| programs to compile)", programs, re.MULTILINE))
    assert len(counts) == 3  # forward passes, samplers, others: CPUs have no bursts
    assert sum(counts) == total


def test_too_little_memory_says_what_it_takes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--kv-cache-memory", "1k"]) == 2
    err = capsys.readouterr().err
    assert "kv_cache_memory=1000" in err
    assert err.count("\n") == 1


PROCESSOR = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "max_pixels": 64 * 100}


def write_seeing(path: Path) -> None:
    (path / "config.json").write_text(json.dumps(CONFIGS["qwen2_5_vl"]))
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


def test_a_device_has_its_share_of_a_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seeing(tmp_path)
    flags = ("--kv-cache-memory", "1M", "--dtype", "float32", "--tensor-parallel-size", "2")
    assert main(["plan", str(tmp_path), "--json", *flags]) == 0
    # Seven query heads of one kv head are two slots of four; 272 tokens fill up to 320.
    qkv, ffn = (112 + 1) * (4 + 2) * 16, 96 // 2
    language = 320 // 2 * 112 + 2 * (qkv + 4 * 16 * 112 + 3 * 112 * ffn + 2 * 112) + 112
    # Of its tower two of four heads, halves of 60 and 192, and all of the patch embedding, norms and other biases.
    heads, ffn, merger = 2 * 12, 60 // 2, 192 // 2
    attention = (48 + 1) * 3 * heads + heads * 48 + 48
    layer = attention + (48 + 1) * 2 * ffn + ffn * 48 + 48 + 2 * 48
    tower = 3 * 2 * 4 * 4 * 48 + 3 * layer + 48 + (192 + 1) * merger + merger * 112 + 112
    assert json.loads(capsys.readouterr().out)["memory"]["weights"] == 4 * (language + tower)


def test_a_model_that_sees_has_calls_of_its_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seeing(tmp_path)
    flags = ("--kv-cache-memory", "1M", "--dtype", "float32")
    assert main(["plan", str(tmp_path), "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    towers = plan["lattice"]["towers"]
    assert [tower["name"] for tower in towers] == ["tower_4x64", "tower_2x128", "tower_1x256", "tower_1x512"]
    assert {tower["name"] for tower in towers} < set(plan["programs"])
    assert plan["memory"]["image_cache"] == (4096 + 1) * 112 * 4
    assert main(["plan", str(tmp_path), *flags, "--mm-processor-kwargs", '{"max_pixels": 16384}']) == 0
    shown = capsys.readouterr().out
    assert "1,024" in shown
    assert "image cache" in shown
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"patch_size": 14}))
    assert main(["plan", str(tmp_path), *flags]) == 2
    assert "patch_size 14" in capsys.readouterr().err
