"""Real models against transformers: the answers that tests/parity/make_goldens.py recorded, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.loading.fetch import FETCHABLE_MODELS

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
NEAR_TIE = 1e-3  # top-two gap in logits of the reference below which answers may part
TOLERANCE = 1e-3  # of log-probabilities; float32 sums in another order leave about 2e-4
NUM_TOP = 20
# Prompts, and tokens of each: the larger model is slow on CPUs.
NUM_TOKENS = {
    "smollm2": (32, 64),
    "qwen2.5-coder-0.5b": (10, 24) if jax.default_backend() == "cpu" else (32, 64),
}


@dataclass(frozen=True)
class Golden:
    """What transformers says to one prompt of L tokens; see make_goldens.py for the arrays."""

    name: str
    text: str
    prompt_ids: list[int]
    prompt_logprobs: np.ndarray  # [L - 1]
    token_ids: list[int]  # G of them
    logprobs: np.ndarray  # [G]
    gaps: np.ndarray  # [G]
    top: dict[int, dict[int, float]]  # answer position → log-probabilities of the 20 likeliest tokens


def read_goldens(model: str) -> list[Golden]:
    """All prompts of one model."""
    with np.load(GOLDENS / f"{model}.npz", allow_pickle=False) as arrays:
        data = dict(arrays)
    meta = json.loads(str(data["meta"]))
    assert meta["sha256"] == FETCHABLE_MODELS[model].sha256
    ends = np.cumsum(data["prompt_lengths"])
    starts = ends - data["prompt_lengths"]
    top_logprobs = data["top_logits"] - data["log_sum_exp"][..., None]
    return [
        Golden(
            name=name,
            text=meta["texts"][i],
            prompt_ids=data["prompt_ids"][starts[i] : ends[i]].tolist(),
            prompt_logprobs=data["prompt_logprobs"][starts[i] - i : ends[i] - i - 1],  # one fewer a prompt
            token_ids=data["token_ids"][i].tolist(),
            logprobs=data["logprobs"][i],
            gaps=data["gaps"][i],
            top={
                int(position): dict(
                    zip(data["top_ids"][i, j].tolist(), top_logprobs[i, j].tolist(), strict=True)
                )
                for j, position in enumerate(data["top_positions"])
            },
        )
        for i, name in enumerate(meta["names"])
    ]


@dataclass(frozen=True)
class Answers:
    """One model's goldens and what this engine says to the same prompts, all in one batch."""

    llm: LLM
    goldens: list[Golden]
    outputs: list[RequestOutput]
    num_tokens: int


@pytest.fixture(scope="module", params=sorted(NUM_TOKENS, reverse=True))
def answers(
    request: pytest.FixtureRequest, model_file: Callable[[str], Path], open_llm: Callable[[Path], LLM]
) -> Iterator[Answers]:
    path = model_file(request.param)
    num_prompts, num_tokens = NUM_TOKENS[request.param]
    goldens = read_goldens(request.param)
    # The last ones are the chats and the longest texts: every model answers some of these.
    goldens = goldens[: num_prompts // 2] + goldens[len(goldens) - (num_prompts + 1) // 2 :]
    params = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=NUM_TOP, prompt_logprobs=0
    )
    with open_llm(path) as llm:
        outputs = llm.generate([golden.prompt_ids for golden in goldens], params, use_tqdm=False)
        yield Answers(llm, goldens, outputs, num_tokens)


def agreed_length(golden: Golden, output: RequestOutput) -> int:
    """How many tokens are the reference's."""
    token_ids = output.outputs[0].token_ids
    pairs = zip(token_ids, golden.token_ids, strict=False)
    return next((i for i, (own, other) in enumerate(pairs) if own != other), len(token_ids))


def test_prompt_token_ids(answers: Answers):
    tokenizer = answers.llm.get_tokenizer()
    for golden in answers.goldens:
        assert tokenizer.encode(golden.text, add_special_tokens=False) == golden.prompt_ids, golden.name


def test_greedy_tokens(answers: Answers):
    for golden, output in zip(answers.goldens, answers.outputs, strict=True):
        assert output.prompt_token_ids == golden.prompt_ids
        assert len(output.outputs[0].token_ids) == answers.num_tokens
        assert output.outputs[0].finish_reason == "length"
        agreed = agreed_length(golden, output)
        if agreed < answers.num_tokens:
            assert golden.gaps[agreed] < NEAR_TIE, f"{golden.name} parts at token {agreed}"


def test_most_answers_are_identical(answers: Answers):
    """Near ties excuse single answers; one in several hundred tokens is as near as that."""
    pairs = zip(answers.goldens, answers.outputs, strict=True)
    parted = [golden.name for golden, output in pairs if agreed_length(golden, output) < answers.num_tokens]
    assert len(parted) <= 2, parted


def test_logprobs(answers: Answers):
    for golden, output in zip(answers.goldens, answers.outputs, strict=True):
        positions = output.outputs[0].logprobs
        assert positions is not None
        own = [positions[i][golden.token_ids[i]].logprob for i in range(agreed_length(golden, output))]
        np.testing.assert_allclose(
            own, golden.logprobs[: len(own)], rtol=0, atol=TOLERANCE, err_msg=golden.name
        )


def test_top_logprobs(answers: Answers):
    for golden, output in zip(answers.goldens, answers.outputs, strict=True):
        positions = output.outputs[0].logprobs
        assert positions is not None
        agreed = agreed_length(golden, output)
        for position, theirs in golden.top.items():
            if position >= agreed:
                continue
            ours = positions[position]
            assert len(ours) == NUM_TOP
            assert sorted(candidate.rank or 0 for candidate in ours.values()) == list(range(1, NUM_TOP + 1))
            last = min(theirs.values())
            for token_id, logprob in theirs.items():
                if token_id not in ours:  # one that shares the last place with another
                    assert logprob - last < TOLERANCE, (
                        f"{golden.name}, token {position}: {token_id} is missing"
                    )
                    continue
                assert ours[token_id].logprob == pytest.approx(logprob, abs=TOLERANCE), (
                    golden.name,
                    position,
                )


def test_prompt_logprobs(answers: Answers):
    for golden, output in zip(answers.goldens, answers.outputs, strict=True):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(golden.prompt_ids)
        own = [
            position[token_id].logprob
            for position, token_id in zip(output.prompt_logprobs[1:], golden.prompt_ids[1:], strict=True)
            if position is not None
        ]
        np.testing.assert_allclose(own, golden.prompt_logprobs, rtol=0, atol=TOLERANCE, err_msg=golden.name)
