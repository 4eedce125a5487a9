"""Real models against answers recorded from vLLM 0.32 on a CPU in float32 (tests/data/vllm)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, RequestOutput, SamplingParams
from tests.real_models.bfloat16_directory import write_bfloat16_directory
from tests.server.recorded import Recording, load

pytestmark = pytest.mark.real_model

TOLERANCE = 1e-3  # of log-probabilities
# Request fields that are SamplingParams.
SHARED_NAMES = ("temperature", "max_tokens", "stop", "prompt_logprobs")


@pytest.fixture(scope="module")
def smollm2(
    model_file: Callable[[str], Path], open_llm: Callable[..., LLM], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """SmolLM2 with its weights rounded to bfloat16, as the recorded server had them."""
    gguf_file = model_file("smollm2")
    directory = tmp_path_factory.mktemp("smollm2-bfloat16")
    write_bfloat16_directory(gguf_file, directory)
    with open_llm(directory, tokenizer=str(gguf_file)) as llm:
        (directory / "model.safetensors").unlink()  # a quarter of a gigabyte that pytest would keep
        yield llm


@pytest.fixture(scope="module")
def qwen(model_file: Callable[[str], Path], open_llm: Callable[..., LLM]) -> Iterator[LLM]:
    with open_llm(model_file("qwen2.5-coder-0.5b")) as llm:
        yield llm


def ask(llm: LLM, recording: Recording) -> list[RequestOutput]:
    """The recorded request through the Python API."""
    body = recording.body
    options: dict[str, Any] = {name: body[name] for name in SHARED_NAMES if name in body}
    if "messages" in body:
        options["logprobs"] = body.get("top_logprobs")
        return llm.chat(body["messages"], SamplingParams(**options), use_tqdm=False)
    options["logprobs"] = body.get("logprobs")
    return llm.generate(body["prompt"], SamplingParams(**options), use_tqdm=False)


def check_choices(recording: Recording, outputs: list[RequestOutput]) -> None:
    """The same texts and ends; the prompt is part of an echoed completion's text."""
    assert len(outputs) == len(recording.choices)
    for output, choice in zip(outputs, recording.choices, strict=True):
        answer = output.outputs[0]
        prompt = recording.body["prompt"] if recording.body.get("echo") else ""
        assert prompt + answer.text == choice.text
        assert (answer.finish_reason, answer.stop_reason) == (choice.finish_reason, choice.stop_reason)


@pytest.mark.parametrize(
    "name",
    [
        "chat-plain",
        "chat-stop-string",
        "comp-plain",
        "comp-list-of-prompts",
        "comp-return-token-ids",
        "comp-stop",
    ],
)
def test_smollm2_texts(smollm2: LLM, name: str):
    recording = load(f"smollm2/{name}")
    outputs = ask(smollm2, recording)
    check_choices(recording, outputs)
    usage = recording.answer["usage"]
    assert sum(len(output.prompt_token_ids) for output in outputs) == usage["prompt_tokens"]
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == usage["completion_tokens"]
    if recording.body.get("return_token_ids"):
        choice = recording.answer["choices"][0]
        assert outputs[0].prompt_token_ids == choice["prompt_token_ids"]
        assert outputs[0].outputs[0].token_ids == choice["token_ids"]


@pytest.mark.parametrize("name", ["comp-logprobs-0", "comp-echo-logprobs"])
def test_smollm2_completion_logprobs(smollm2: LLM, name: str):
    recording = load(f"smollm2/{name}")
    outputs = ask(smollm2, recording)
    check_choices(recording, outputs)
    theirs = recording.answer["choices"][0]["logprobs"]
    answer = outputs[0].outputs[0]
    assert answer.logprobs is not None
    start = len(outputs[0].prompt_token_ids) if recording.body.get("echo") else 0
    for i, (token_id, position) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True), start):
        assert position[token_id].decoded_token == theirs["tokens"][i]
        assert position[token_id].logprob == pytest.approx(theirs["token_logprobs"][i], abs=TOLERANCE)
        ours = {candidate.decoded_token: candidate.logprob for candidate in position.values()}
        assert ours == pytest.approx(theirs["top_logprobs"][i], abs=TOLERANCE)


def test_smollm2_chat_logprobs(smollm2: LLM):
    recording = load("smollm2/chat-logprobs-top5-stream")
    outputs = ask(smollm2, recording)
    check_choices(recording, outputs)
    assert recording.chunks is not None
    theirs = [
        token
        for chunk in recording.chunks
        for choice in chunk["choices"]
        for token in (choice["logprobs"] or {}).get("content", [])
    ]
    positions = outputs[0].outputs[0].logprobs
    assert positions is not None
    assert len(positions) == len(theirs) == recording.body["max_tokens"]
    for position, token in zip(positions, theirs, strict=True):
        ours = {candidate.decoded_token: candidate.logprob for candidate in position.values()}
        assert ours == pytest.approx(
            {top["token"]: top["logprob"] for top in token["top_logprobs"]}, abs=TOLERANCE
        )


@pytest.mark.parametrize("name", ["chat-prompt-logprobs", "comp-prompt-logprobs"])
def test_smollm2_prompt_logprobs(smollm2: LLM, name: str):
    recording = load(f"smollm2/{name}")
    outputs = ask(smollm2, recording)
    check_choices(recording, outputs)
    answer = recording.answer
    theirs = (
        answer["prompt_logprobs"] if "messages" in recording.body else answer["choices"][0]["prompt_logprobs"]
    )
    ours = outputs[0].prompt_logprobs
    assert ours is not None
    assert len(ours) == len(theirs)
    assert ours[0] is theirs[0] is None
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        assert own is not None
        assert {str(token_id) for token_id in own} == set(other)
        for token_id, candidate in own.items():
            expected = other[str(token_id)]
            assert candidate.logprob == pytest.approx(expected["logprob"], abs=TOLERANCE)
            assert (candidate.rank, candidate.decoded_token) == (expected["rank"], expected["decoded_token"])


@pytest.mark.parametrize(
    "name", ["q-chat-plain", "q-utf8-chinese-stream", "q-utf8-emoji-stream", "q-utf8-japanese-stream"]
)
def test_qwen_texts(qwen: LLM, name: str):
    recording = load(f"qwen/{name}")
    outputs = ask(qwen, recording)
    check_choices(recording, outputs)
    if recording.chunks is not None:
        choices = [choice for chunk in recording.chunks for choice in chunk["choices"]]
        theirs = [token_id for choice in choices for token_id in choice.get("token_ids") or []]
        assert outputs[0].outputs[0].token_ids == theirs
