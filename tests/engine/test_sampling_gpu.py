"""The GPU's filtered draw, interpreted, against the straight-line code and the sorted reference."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.engine import sampling_gpu
from jaxserve.engine.sampler_state import init_state
from jaxserve.engine.sampling import sample
from jaxserve.engine.sampling_gpu import draw_rows
from jaxserve.engine.sampling_noise import row_keys
from jaxserve.engine.sampling_rows import Variant
from jaxserve.sampling_params import SamplingParams
from tests.engine.sampling_reference import make_rows, sampled_ids
from tests.engine.test_sampling_filters import BATCH, KINDS, LARGE, check, logits_of_kind, mixed_params

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


@partial(jax.jit, static_argnames="interpret")
def launch(x, temperature, top_k, top_p, slack, seed_lo, seed_hi, position, *, interpret):
    keys = row_keys(seed_lo, seed_hi, position)
    return draw_rows(x, temperature, top_k, top_p, slack, keys, interpret=interpret)


def drawn(logits: np.ndarray, params: list[SamplingParams], positions: list[int]) -> np.ndarray:
    size = logits.shape[1]
    seeds = [(p.seed or 0) & (2**64 - 1) for p in params]
    slack = [p.temperature * np.log(p.min_p) if p.min_p > 0 and not p.is_greedy else -np.inf for p in params]
    return np.asarray(
        launch(
            logits,
            np.array([0 if p.is_greedy else p.temperature for p in params], np.float32),
            np.array([min(p.top_k, size) if p.top_k > 0 else size for p in params], np.int32),
            np.array([p.top_p for p in params], np.float32),
            np.array(slack, np.float32),
            np.array([s & 0xFFFFFFFF for s in seeds], np.uint32),
            np.array([s >> 32 for s in seeds], np.uint32),
            np.array(positions, np.uint32),
            interpret=jax.default_backend() == "cpu",
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_the_token_of_the_straight_line_code(kind: str) -> None:
    rng = np.random.default_rng([4, *kind.encode()])
    for call in range(3):
        logits = np.stack([logits_of_kind(kind, LARGE, rng) for _ in range(BATCH)])
        params = [mixed_params(rng, LARGE, seed) for seed in range(call * BATCH, (call + 1) * BATCH)]
        positions = rng.integers(0, 10**6, BATCH).tolist()
        ids = drawn(logits, params, positions)
        np.testing.assert_array_equal(ids, sampled_ids(logits, params, positions, on_cpu=False))
        for row in range(BATCH):
            check(logits[row], params[row], positions[row], int(ids[row]))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_p": 0.9},
        {"top_p": 0.999999},
        {"top_k": 64},
        {"top_k": 65, "top_p": 0.5},
        {"top_k": 9000},
        {"top_k": 9000, "top_p": 0.7, "min_p": 0.001},
        {"min_p": 0.5},
        {"min_p": 1e-30, "top_p": 0.99},
    ],
)
def test_flat_rows_search_their_whole_vocabulary(fields: dict[str, float]) -> None:
    """Temperatures at which the candidates hold little of the mass, or just all of it."""
    rng = np.random.default_rng(6)
    logits = np.stack([logits_of_kind("normal", LARGE, rng) * 3 for _ in range(BATCH)])
    params = [SamplingParams(seed=s, temperature=0.2 * (s + 1), **fields) for s in range(BATCH)]  # type: ignore[arg-type]  # by name
    params[3] = replace(params[3], temperature=0.0)
    ids = drawn(logits, params, [7] * BATCH)
    np.testing.assert_array_equal(ids, sampled_ids(logits, params, [7] * BATCH, on_cpu=False))
    assert ids[3] == logits[3].argmax()


def test_a_row_without_any_allowed_token_gives_token_0() -> None:
    logits = np.full((BATCH, LARGE), -np.inf, np.float32)
    params = [
        SamplingParams(seed=1, top_p=0.5, top_k=500, min_p=0.1),
        SamplingParams(seed=1, top_p=0.5),
        SamplingParams(seed=1, top_k=3),
        SamplingParams(seed=1),
    ] * (BATCH // 4)
    assert drawn(logits, params, [0] * BATCH).tolist() == [0] * BATCH


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.zeros((BATCH, LARGE), np.float32)
    logits[0, [777, 4000]] = 1
    logits[1, LARGE - 1] = 1
    params = [SamplingParams(seed=1, temperature=0, top_k=5, top_p=0.5)] * BATCH
    assert drawn(logits, params, [0] * BATCH).tolist() == [777, LARGE - 1] + [0] * (BATCH - 2)


def test_lowers_for_cuda_as_one_kernel_that_orders_no_vocabulary() -> None:
    spec = jax.ShapeDtypeStruct
    numbers = [
        spec((BATCH,), dtype) for dtype in (jnp.float32, jnp.int32, *[jnp.float32] * 2, *[jnp.uint32] * 3)
    ]
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = launch.trace(spec((BATCH, LARGE), jnp.float32), *numbers, interpret=False)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") - text.count("@Sharding") == 1
    assert text.count('name = "draw_rows"') == 1
    ordered = re.findall(r"(?:chlo\.top_k|stablehlo\.sort|TopK).*?tensor<([0-9x]+)xf32>", text)
    assert ordered == ["8x313"]  # ceil(LARGE / 64) maxima


@pytest.mark.parametrize("variant", ["random", "full"])
def test_the_sampler_of_a_gpu_has_the_kernel_in_it(variant: Variant) -> None:
    def step(logits, rows, state):
        return sample(logits, rows, state, variant=variant, on_cpu=False, on_gpu=True)

    rows = make_rows([SamplingParams(seed=s) for s in range(BATCH)])
    args = jnp.zeros((BATCH, LARGE)), rows, init_state(BATCH, LARGE)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(step).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('name = "draw_rows"') == 1
    assert "stablehlo.case" not in text
    assert "stablehlo.while" not in text


def test_short_rows_are_refused() -> None:
    assert not sampling_gpu.takes(4096)
    with pytest.raises(ValueError, match="more than 4096 logits a row, got 300"):
        drawn(np.zeros((1, 300), np.float32), [SamplingParams(seed=1)], [0])
