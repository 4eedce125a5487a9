"""`sample` as programs have it: variants, processors, logprobs, state, and independence of the batch."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxserve.engine.logprobs import gather_logprobs
from jaxserve.engine.sampler_state import COUNT_MASK, PROMPT_BIT, SamplerState, admit_chunk, init_state
from jaxserve.engine.sampling_rows import (
    FLAGS,
    VARIANTS,
    Variant,
    allow_all,
    allow_only,
    bias_arrays,
    covers,
    forbid,
    has_processors,
    mask_words,
)
from jaxserve.sampling_params import SamplingParams
from tests.engine.sampling_reference import (
    compiled,
    log_softmax,
    make_rows,
    penalised,
    sampled_ids,
    scores,
)

V = 300
CHUNK = 16
admit = jax.jit(admit_chunk, donate_argnums=0)


def random_logits(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 3).astype(np.float32)


def admit_sequence(
    state: SamplerState, slot: int, prompt: list[int], output: list[int], params: SamplingParams
) -> SamplerState:
    """As the runner does it: the whole sequence in chunks of one size."""
    bias_ids, bias_values = bias_arrays(params)
    tokens = prompt + output
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        num_prompt = min(max(len(prompt) - start, 0), len(chunk))
        ids = np.zeros(CHUNK, np.int32)
        ids[: len(chunk)] = chunk
        state = admit(
            state,
            np.int32(slot),
            ids,
            np.int32(num_prompt),
            np.int32(len(chunk)),
            start == 0,
            bias_ids,
            bias_values,
        )
    return state


MIXED = [
    SamplingParams(seed=7, temperature=0.0),
    SamplingParams(seed=-3),
    SamplingParams(seed=2**64 - 1, temperature=0.5, top_k=5),
    SamplingParams(seed=2**40, temperature=1.3, top_p=0.9),
    SamplingParams(seed=1, min_p=0.1),
    SamplingParams(seed=1, top_k=200, top_p=0.99, temperature=2.0),
]


@pytest.mark.parametrize(("size", "on_cpu"), [(V, True), (V, False), (20011, True)])
def test_a_row_gets_the_same_token_in_any_company(size, on_cpu):
    """Alone, in other buckets, orders and slots, with other neighbours."""
    logits = random_logits(len(MIXED), size)
    positions = list(range(10, 10 + len(MIXED)))
    step = compiled("random", on_cpu)
    alone = []
    for i, params in enumerate(MIXED):
        ids, _ = step(
            jnp.asarray(logits[i : i + 1]), make_rows([params], positions[i : i + 1]), init_state(1, size)
        )
        alone.append(int(ids[0]))
    rng = np.random.default_rng(1)
    for bucket, num_slots in ((8, 8), (8, 8), (16, 40))[: 3 if on_cpu else 2]:
        order = rng.permutation(len(MIXED)).tolist()
        slots = rng.permutation(num_slots)[: len(MIXED)].tolist()
        rows = make_rows(
            [MIXED[i] for i in order],
            [positions[i] for i in order],
            slots=slots,
            num_slots=num_slots,
            bucket=bucket,
        )
        padded = np.concatenate([logits[order], random_logits(bucket - len(order), size, seed=bucket)])
        ids, state = step(jnp.asarray(padded), rows, init_state(num_slots, size))
        assert np.asarray(ids)[: len(order)].tolist() == [alone[i] for i in order]
        assert np.asarray(state.last_token)[slots].tolist() == [alone[i] for i in order]


def test_seed_and_position_decide():
    logits = np.zeros((6, V), np.float32)
    seeds, positions = [1, 1, 2, 1, 1 + 2**32, -1], [5, 5, 5, 6, 5, 5]
    ids = sampled_ids(logits, [SamplingParams(seed=s) for s in seeds], positions).tolist()
    assert ids[0] == ids[1]
    # Chance of a false alarm on uniform logits: 1 in 30, and these seeds are fixed.
    assert len(set(ids[1:])) == 5


@pytest.mark.parametrize(("size", "on_cpu"), [(V, True), (V, False), (6007, False)])
def test_variants_agree_on_what_they_all_honour(size, on_cpu):
    logits = random_logits(8, size)
    greedy = [SamplingParams(seed=s, temperature=0) for s in range(8)]
    plain = [SamplingParams(seed=s, temperature=0.3 + s / 10) for s in range(8)]
    filtered = [SamplingParams(seed=s, top_k=s, top_p=0.5 + s / 20) for s in range(8)]
    narrow = [
        SamplingParams(seed=s, temperature=s / 7, top_k=1 + s * 9, top_p=0.5 + s / 20) for s in range(8)
    ]
    cases: list[tuple[Variant, list[SamplingParams]]] = [
        ("greedy", greedy),
        ("temperature", plain),
        ("top_k", narrow),
        ("random", filtered),
    ]
    for least, params in cases:
        want = sampled_ids(logits, params, variant="random", on_cpu=on_cpu)
        for variant in VARIANTS:
            if covers(variant, least):
                got = sampled_ids(logits, params, variant=variant, on_cpu=on_cpu)
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -1.0, "presence_penalty": -0.5},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.4},
        {"logit_bias": {3: 100.0, 5: -100.0}},
        {"logit_bias": {0: -100.0}},
        {"logit_bias": {7: 1e300}},
        {"logit_bias": {4: 3.0, 0: 2.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    ],
)
def test_penalties_and_bias_over_a_generation(fields, on_cpu):
    """Sampling again and again from near-flat logits, greedy and drawn, follows the formulas step by step."""
    rng = np.random.default_rng(5)
    logits = random_logits(8, V) / 3
    params = [SamplingParams(seed=i, temperature=t, **fields) for i, t in enumerate((0.0, 1.0))]
    histories: list[tuple[list[int], list[int]]] = [
        (rng.integers(0, V, 21).tolist(), []),
        (rng.integers(0, V, 3).tolist(), rng.integers(0, 20, 30).tolist()),  # resumed after a preemption
    ]
    state = init_state(8, V)
    for slot, (prompt, output), p in zip((3, 1), histories, params, strict=True):
        state = admit_sequence(state, slot, [9, 8, 7], [1, 1, 2], params[0])  # the slot's former sequence
        state = admit_sequence(state, slot, prompt, output, p)
    step = compiled("full", on_cpu)
    for position in range(12):
        rows = make_rows(params, [position] * 2, slots=[3, 1], num_slots=8, bucket=8)
        ids, state = step(jnp.asarray(logits), rows, state)
        for row, ((prompt, output), p) in enumerate(zip(histories, params, strict=True)):
            s = scores(penalised(logits[row], p, prompt, output), p, position)
            sampled = int(ids[row])
            assert s[sampled] >= s.max() - 1e-4
            output.append(sampled)


def test_a_row_without_state_ignores_what_its_slot_held():
    logits = random_logits(8, V)
    former = SamplingParams(seed=0, logit_bias={5: 100.0}, repetition_penalty=2.0)
    state = admit_sequence(init_state(8, V), 1, [1, 2, 3], [4, 5], former)
    seen = np.asarray(state.tokens_seen)
    plain = [SamplingParams(seed=0, temperature=0)] * 8
    ids, state = compiled("full")(jnp.asarray(logits), make_rows(plain), state)
    assert np.asarray(ids).tolist() == logits.argmax(-1).tolist()
    np.testing.assert_array_equal(state.tokens_seen, seen)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_allows_exactly_its_tokens(temperature):
    logits = random_logits(64, V)
    mask = np.zeros((64, mask_words(V)), np.uint32)
    rng = np.random.default_rng(2)
    allowed = []
    for row in range(64):
        ids = set(rng.integers(0, V, rng.integers(1, 20)).tolist()) | {V - 1} if row % 2 else {row}
        allow_only(mask[row], ids)
        if row % 4 == 3:
            allow_all(mask[row])
            forbid(mask[row], set(range(V)) - ids)
        allowed.append(np.isin(np.arange(V), sorted(ids)))
    params = [SamplingParams(seed=s, temperature=temperature) for s in range(64)]
    ids = sampled_ids(logits, params, variant="full", allowed_mask=mask)
    for row in range(64):
        s = np.where(allowed[row], scores(logits[row], params[row], 0), -np.inf)
        assert s[ids[row]] >= s.max() - 1e-5


def test_forbid_keeps_what_was_forbidden():
    mask = np.empty(mask_words(70), np.uint32)
    allow_all(mask)
    forbid(mask, [0, 31, 32, 69])
    forbid(mask, [1, 0, 69])
    bits = [(int(mask[t // 32]) >> (t % 32)) & 1 for t in range(70)]
    assert [t for t in range(70) if not bits[t]] == [0, 1, 31, 32, 69]


def test_mask_is_refused_where_it_would_be_ignored():
    mask = np.zeros((1, mask_words(V)), np.uint32)
    with pytest.raises(ValueError, match="allowed_mask needs variant 'full' or 'full_top_k', got 'random'"):
        sampled_ids(random_logits(1, V), [SamplingParams(seed=1)], allowed_mask=mask)


@pytest.mark.parametrize("num_logprobs", [0, 1, 5])
def test_logprobs(num_logprobs):
    logits = np.round(random_logits(6, V), 1)  # rounded: ranks and alternatives meet ties
    ids, want = np.random.default_rng(3).integers(0, V, 6), log_softmax(logits)
    got = jax.jit(gather_logprobs, static_argnums=2)(logits, ids, num_logprobs)
    rows = np.arange(6)
    np.testing.assert_allclose(got.logprob, want[rows, ids], atol=1e-5)
    np.testing.assert_array_equal(got.rank, 1 + (logits > logits[rows, ids][:, None]).sum(-1))
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :num_logprobs]
    np.testing.assert_array_equal(got.top_ids, order)
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(want, order, 1), atol=1e-5)


def test_admit_counts_prompt_and_output_over_chunks():
    rng = np.random.default_rng(6)
    state = init_state(3, V)
    want = np.zeros((4, V), np.int64)
    for slot, num_prompt, num_output in ((0, 5, 0), (2, CHUNK, 40), (1, 40, 7), (2, 50, 3), (0, 1, 33)):
        prompt, output = (rng.integers(0, 30, n).tolist() for n in (num_prompt, num_output))
        state = admit_sequence(state, slot, prompt, output, SamplingParams(seed=0, logit_bias={slot: 2.0}))
        want[slot] = np.bincount(output, minlength=V) | np.where(np.isin(np.arange(V), prompt), PROMPT_BIT, 0)
        assert state.bias_ids[slot, 0] == slot
        assert state.bias_values[slot].sum() == 2.0
        np.testing.assert_array_equal(state.tokens_seen, want)


def test_admit_leaves_out_ids_beyond_the_vocabulary():
    state = admit_sequence(init_state(1, V), 0, [-1, V, V + 5, 4], [V, -7, 4, 4], SamplingParams(seed=0))
    row = np.asarray(state.tokens_seen)[0]
    assert row[4] == PROMPT_BIT | 2
    assert np.flatnonzero(row).tolist() == [4]


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_active_rows_touch_their_slots(variant):
    params = [SamplingParams(seed=s, temperature=0, presence_penalty=0.1) for s in range(3)]
    state = init_state(8, V)
    for slot in range(8):
        state = admit_sequence(state, slot, [1], [], params[0])
    rows = make_rows(params, slots=[2, 0, 3], num_slots=8, bucket=8)
    ints = np.array(rows.ints)
    ints[1, FLAGS] = 0  # the row at slot 0 is a prefill that does not end in this step
    rows = type(rows)(jnp.asarray(ints), rows.floats)
    logits = np.zeros((8, V), np.float32)
    logits[np.arange(8), [10, 20, 30, 40, 50, 60, 70, 80]] = 5
    _, state = compiled(variant)(jnp.asarray(logits), rows, state)
    assert np.asarray(state.last_token)[:8].tolist() == [0, 0, 10, 30, 0, 0, 0, 0]
    counts = np.asarray(state.tokens_seen)[:8] & COUNT_MASK
    assert np.argwhere(counts).tolist() == ([[2, 10], [3, 30]] if has_processors(variant) else [])


def test_the_state_is_updated_in_place():
    """A copy of tokens_seen would cost more than all of sampling."""
    slots, vocab = 24, 4099  # numbers that no other array of the program has
    rows = make_rows([SamplingParams(seed=s) for s in range(8)], num_slots=slots)
    state = init_state(slots, vocab)
    text = compiled("full").lower(jnp.zeros((8, vocab)), rows, state).compile().as_text()
    assert text is not None
    shape = f"s32[{slots + 1},{vocab}]"
    assert shape in text
    assert not [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line]


DEVICES = {
    "cuda": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators_without_control_flow(platform, variant):
    mask = np.zeros((8, mask_words(1000)), np.uint32) if has_processors(variant) else None
    rows = make_rows([SamplingParams(seed=s) for s in range(8)], allowed_mask=mask)

    def step(logits, rows, state):
        ids, state = compiled(variant, False)(logits, rows, state)
        return gather_logprobs(logits, ids, 5), state

    args = jnp.zeros((8, 1000)), rows, init_state(8, 1000)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=DEVICES[platform])):
        traced = jax.jit(step).trace(*args)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.case" not in text
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("variant", ["top_k", "full_top_k"])
def test_top_k_on_a_gpu_orders_groups_and_not_the_vocabulary(variant):
    size = 20011
    rows = make_rows([SamplingParams(seed=s) for s in range(8)])
    args = jnp.zeros((8, size)), rows, init_state(8, size)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=DEVICES["cuda"])):
        traced = compiled(variant, False).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    ordered = re.findall(r"(?:chlo\.top_k|stablehlo\.sort|TopK).*?tensor<([0-9x]+)xf32>", text)
    assert ordered == ["8x313"]  # ceil(size / 64) maxima
