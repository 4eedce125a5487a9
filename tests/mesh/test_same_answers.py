"""Engines over several devices answer as one device does, whatever the model's sizes: tokens, ranks, probabilities."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tiny_engine import DenseModel
from tests.models.vision_cases import goldens

CASES = [
    "llama:8",
    "mistral:4",
    "qwen2:4",
    "qwen3:4",
    "mixtral:2",
    "mixtral:4:experts",
    "qwen3_moe:8",
    "qwen3_moe:4:experts",
]
REFERENCES = sorted({f"{case.split(':')[0]}:1" for case in CASES})


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case, all from one process that has eight pretend devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Compiling is nearly all of the time; samplers of different families may be the same.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "NPROC": "16",  # with a thread a core, devices that wait for each other leave none to go on with
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.mesh.on_eight_devices",
            *REFERENCES,
            *CASES,
            "restart",
            "seeing",
            "shards",
        ],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["case"]: line["answers"] for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_answers_as_one_device_does(answers: dict[str, Any], case: str) -> None:
    expected, found = answers[f"{case.split(':')[0]}:1"], answers[case]
    assert expected.keys() == found.keys()
    for name, answer in expected.items():
        assert found[name]["tokens"] == answer["tokens"], name
        assert len(answer["tokens"]) == 8
        for field in ("logprobs", "prompt_logprobs"):
            for one, other in zip(answer[field], found[name][field], strict=True):
                assert one.keys() == other.keys()
                for key in ("token_id", "rank", "top_ids"):
                    assert other[key] == one[key], (name, field)
                assert other["logprob"] == pytest.approx(one["logprob"], abs=1e-4)
                assert other["top_logprobs"] == pytest.approx(one["top_logprobs"], abs=1e-4)
    assert len(expected["penalties"]["logprobs"]) == 8


def test_an_engine_over_some_of_the_devices_finds_its_programs_again(answers: dict[str, Any]) -> None:
    found = answers["restart"]
    assert found["device"] == "2 x cpu"
    assert found["compiles"] == [0, 0]
    assert found["tokens"] == [DenseModel(seed=3).greedy(range(20), 12)] * 2


def test_a_model_that_sees_answers_as_on_one_device(answers: dict[str, Any]) -> None:
    assert answers["seeing"] == goldens()["qwen2_5_vl"]["odd sizes"]["token_ids"]


def test_the_largest_of_equal_logits_is_the_first_on_any_device(answers: dict[str, Any]) -> None:
    found = answers["shards"]
    assert found["found"] == found["wanted"]
    assert found["same"]
