"""The programs of a GPU engine, lowered for CUDA on a machine that has none: shapes, kernels and donation fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from jaxserve.config import EngineConfig, ExpertsConfig
from jaxserve.engine.programs import PROMPT_LOGPROBS, Program, ProgramBook
from jaxserve.models.sharding import DATA, EXPERT, TENSOR
from tests.engine.pretend_device import pretend_book
from tests.engine.tiny_engine import TINY
from tests.kernels_pallas.lowering import DEVICES, triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

NUM_LAYERS = 5
MODEL = replace(
    TINY,
    num_layers=NUM_LAYERS,
    layer_windows=(None,) * NUM_LAYERS,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    hidden_size=128,
)
WITH_EXPERTS = replace(
    MODEL,
    family="mixtral",
    experts=ExpertsConfig(
        num_experts=8,
        num_per_token=2,
        intermediate_size=64,
        renormalize=True,
        layers=(True,) * NUM_LAYERS,
    ),
)


ONE_GPU = AbstractMesh((1,), ("x",), abstract_device=DEVICES["cuda"])
FOUR_GPUS = AbstractMesh((1, 4, 1), (DATA, TENSOR, EXPERT), abstract_device=DEVICES["cuda"])


def lower(jitted: Any, *specs: Any, mesh: AbstractMesh = ONE_GPU) -> jax.stages.Lowered:
    with jax.sharding.use_abstract_mesh(mesh):
        return jitted.trace(*specs).lower(lowering_platforms=("cuda",))


@pytest.fixture
def book(request: pytest.FixtureRequest) -> Iterator[ProgramBook]:
    """Programs of a small engine on a pretend H100; the parameter is options of EngineConfig and the model."""
    options, model = request.param
    config = EngineConfig(
        model="tiny", max_num_seqs=4, max_num_batched_tokens=64, gpu_memory_utilization=0.5, **options
    )
    with pretend_book(config, model, lower, memory=2**30) as (settings, book):
        assert (settings.platform, settings.dtype) == ("gpu", options.get("dtype", "bfloat16"))
        yield book


@pytest.mark.parametrize(
    "book",
    [({}, MODEL), ({"kv_cache_dtype": "fp8"}, MODEL), ({}, WITH_EXPERTS)],
    indirect=True,
    ids=["defaults", "fp8 pages", "experts"],
)
def test_every_program_lowers(book: ProgramBook) -> None:
    texts = {program.name: program.lower().as_text() for program in book}
    for name, text in texts.items():
        if name.startswith("forward"):
            assert "triton" in text, f"{name} has none of our kernels"
            # Pages of each layer and the page table: what is not aliased would be copied in every step.
            assert text.count("tf.aliasing_output") >= NUM_LAYERS + 1, name
            # Layers that are alike are one function; nothing is added before the first, and the last may be cut.
            assert text.count("func.func private @_run_layer") <= 3, name


@contextmanager
def programs_of_four(max_num_batched_tokens: int) -> Iterator[dict[str, Program]]:
    """Programs by name, of a small engine on four pretend H100s."""
    config = EngineConfig(
        model="tiny",
        max_num_seqs=4,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=0.5,
        tensor_parallel_size=4,
    )
    over_four = partial(lower, mesh=FOUR_GPUS)
    with pretend_book(config, MODEL, over_four, memory=2**30, mesh=FOUR_GPUS) as (_, book):
        yield {program.name: program for program in book}


def test_four_gpus_add_up_twice_a_layer_and_for_the_embedding() -> None:
    with programs_of_four(64) as programs:
        step = programs["forward_decode_4"].lower().as_text()
        greedy = programs["sample_greedy_4"].lower().as_text()
        sampled = programs["sample_full_4"].lower().as_text()
        told = programs["sample_full_logprobs_4"].lower().as_text()
    # Layers that are alike are one function, the last may be another.
    calls = step.count("call @_run_layer")
    assert calls == NUM_LAYERS
    functions = step.count("func.func private @_run_layer")
    assert step.count("stablehlo.all_reduce") == 1 + 2 * functions
    assert "triton" in step
    assert step.count("tf.aliasing_output") + step.count("jax.buffer_donor") >= NUM_LAYERS + 1
    assert greedy.count("stablehlo.all_gather") == 1
    assert "stablehlo.all_to_all" not in greedy
    assert sampled.count("stablehlo.all_to_all") == 1
    # What is gathered is a number or a few of each row, never its logits.
    sizes = [
        re.findall(r"\d+", shape) for shape in re.findall(r"all_gather.*?-> tensor<([\dx]*)", sampled + told)
    ]
    assert len(sizes) == sampled.count("stablehlo.all_gather") + told.count("stablehlo.all_gather")
    assert max(int(size) for shape in sizes for size in shape) < MODEL.vocab_size // 4


def test_of_very_many_tokens_each_of_four_gpus_adds_and_norms_a_share() -> None:
    with programs_of_four(8192) as programs:
        long = programs["forward_mixed_8192"].lower().as_text()
        short = programs["forward_mixed_2048"].lower().as_text()
    # Of functions there are the first layer, one for those between, and the last, which goes on with the rows wanted.
    assert long.count("func.func private @_run_layer") == 3
    assert long.count("stablehlo.reduce_scatter") == 2 * 2
    assert long.count("stablehlo.all_gather") == 2 * 2 + 1
    assert long.count("stablehlo.all_reduce") == 1 + 3  # of the embedding, and the last layer's
    assert short.count("stablehlo.all_reduce") == 1 + 2 * 3
    assert "stablehlo.reduce_scatter" not in short


@pytest.mark.parametrize(
    "book",
    [({"dtype": "float32"}, MODEL), ({"dtype": "float32"}, WITH_EXPERTS)],
    indirect=True,
    ids=["float32", "experts"],
)
def test_float32_is_multiplied_as_float32(book: ProgramBook) -> None:
    kinds = ("forward_decode_4", "forward_mixed_64", "sample_greedy_logprobs_4", PROMPT_LOGPROBS)
    chosen = [program for program in book if program.name in kinds]
    assert len(chosen) == len(kinds)
    for program in chosen:
        lowered = program.lower()
        products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
        assert products, program.name
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products), program.name
        assert not [text for text in triton_kernels(lowered).values() if "tf32" in text], program.name
