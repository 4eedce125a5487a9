"""Engines over several devices answer as one device does, whatever the model's sizes: tokens, ranks, probabilities."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from jaxserve.models.registry import FAMILIES
from tests.engine.tiny_engine import DenseModel
from tests.mesh.models import SEEING, TEXT
from tests.models.vision_cases import NUM_GENERATED, goldens
from tests.pretend_devices import run_on_devices


def _cases(family: str) -> list[str]:
    experts = TEXT[family].experts if family in TEXT else None
    cases = [f"{family}:{devices}" for devices in ("2", "2x2", "4", "8")]
    if family == "llama":
        cases.append("llama:2x1")  # without a mesh
        cases.append("llama:3:scattered")  # steps of 3 tokens, not those of 16
    if experts is not None:
        cases += [f"{family}:4:experts", f"{family}:4:experts:scattered"]
    if family in ("llama", *SEEING):
        cases.append(f"{family}:4:scattered")
    return cases


CASES = [case for family in FAMILIES for case in _cases(family)]
# Of one process each.  Those whose samplers are alike are together: what is compiled for one serves the next.
PROCESSES = (("llama", "qwen2", *SEEING), ("mistral", "qwen3", "mixtral", "qwen3_moe"))
OVER_HOSTS = ("qwen2_5_vl:hosts", "mixtral:hosts:experts")


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case, from two processes with eight pretend devices each."""
    cases = [
        [case for family in families for case in (f"{family}:1", *_cases(family))] for families in PROCESSES
    ]
    cases[-1] += ["restart", "shards"]

    def run(cases: list[str], folder: Path) -> list[dict[str, Any]]:
        caching = {
            "JAX_COMPILATION_CACHE_DIR": str(folder),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        printed = run_on_devices(8, "tests.mesh.on_eight_devices", *cases, **caching)
        return [json.loads(line) for line in printed.splitlines()]

    # Not by the threads: they would race for the folder that all of them are in.
    folders = [tmp_path_factory.mktemp("xla") for _ in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        return {line["case"]: line["answers"] for lines in pool.map(run, cases, folders) for line in lines}


@pytest.fixture(scope="session")
def answers_over_hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case, from two processes with a device each, of which one plans and answers."""
    arguments = str(_free_ports(1 + len(OVER_HOSTS))), str(tmp_path_factory.mktemp("xla")), *OVER_HOSTS

    def run(rank: int) -> str:
        return run_on_devices(1, "tests.mesh.on_two_hosts", str(rank), *arguments)

    with ThreadPoolExecutor(2) as pool:
        printed, _ = pool.map(run, (0, 1))
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]  # others are Gloo's
    return {line["case"]: line["answers"] for line in lines}


def _free_ports(count: int) -> int:
    """The first of so many in a row.

    Of those that no system gives to whoever asks for any: it is seconds before they are bound again.
    """
    while True:
        port = random.randrange(20_000, 30_000)
        with ExitStack() as stack:
            try:
                for offset in range(count):
                    stack.enter_context(socket.create_server(("", port + offset)))
            except OSError:
                continue
        return port


def test_every_family_is_among_them() -> None:
    assert {family for families in PROCESSES for family in families} == FAMILIES.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_answers_as_one_device_does(answers: dict[str, Any], case: str) -> None:
    family, devices, *_ = case.split(":")
    found = answers[case]
    copies, _, num_devices = devices.rpartition("x")
    device = "cpu" if num_devices == "1" else f"{num_devices} x cpu"
    assert found["device"] == (f"{copies} engines of " if copies else "") + device
    assert found["num_engines"] == int(copies or 1), "each has some of the requests"
    _assert_same(answers[f"{family}:1"]["requests"], found["requests"])


@pytest.mark.parametrize("case", OVER_HOSTS)
def test_two_hosts_answer_as_one_device_does(
    answers: dict[str, Any], answers_over_hosts: dict[str, Any], case: str
) -> None:
    found = answers_over_hosts[case]
    assert found["device"] == "2 x cpu"
    _assert_same(answers[f"{case.partition(':')[0]}:1"]["requests"], found["requests"])


def _assert_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
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
    assert len(expected["scored"]["prompt_logprobs"]) > 8


@pytest.mark.parametrize("family", SEEING)
def test_what_a_model_that_sees_answers_is_transformers_own(answers: dict[str, Any], family: str) -> None:
    found = answers[f"{family}:8"]["requests"]["greedy"]["tokens"]
    assert found[:NUM_GENERATED] == goldens()[family]["odd sizes"]["token_ids"]


def test_an_engine_over_some_of_the_devices_finds_its_programs_again_also_over_others(
    answers: dict[str, Any],
) -> None:
    found = answers["restart"]
    assert found["device"] == "2 x cpu"
    assert found["compiles"] == [0, 0, 0]
    assert found["tokens"] == [DenseModel(seed=3).greedy(range(20), 12)] * 3


def test_the_largest_of_equal_logits_is_the_first_on_any_device(answers: dict[str, Any]) -> None:
    found = answers["shards"]
    assert found["found"] == found["wanted"]
    assert found["same"]
