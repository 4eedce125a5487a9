"""Texts of several prompts: tokenized together on all cores, and not many behind one that is too long."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from jaxserve import async_llm, inputs
from jaxserve.async_llm import AsyncLLM
from jaxserve.errors import ContextLengthError
from jaxserve.inputs import encode_texts, tokenize_texts
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.text.tokenizer import Tokenizer
from tests.scripted import ScriptedClient, scripted_info
from tests.tiny import byte_tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def together(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of the texts of every call of the tokenizer, on a machine of three cores with small limits."""
    calls: list[list[int]] = []
    encode_batch = tokenizer.encode_batch

    def recorded(texts: list[str], *arguments: Any, **options: Any) -> list[list[int]]:
        calls.append([len(text) for text in texts])
        return encode_batch(texts, *arguments, **options)

    monkeypatch.setattr(tokenizer, "encode_batch", recorded)
    monkeypatch.setattr(inputs, "_num_cores", lambda: 3)
    monkeypatch.setattr(inputs, "_TOGETHER", 100)
    monkeypatch.setattr(inputs, "_MOST_TOGETHER", 1000)
    return calls


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([30] * 9, [[30] * 4, [30] * 4, [30]]),
        ([200] * 5, [[200] * 3, [200] * 2]),
        ([900, 900, 50], [[900, 900], [50]]),
        ([2000, 1, 2000], [[2000], [1, 2000]]),
        ([], []),
    ],
)
def test_long_texts_keep_every_core_busy(
    tokenizer: Tokenizer, together: list[list[int]], lengths: list[int], calls: list[list[int]]
):
    texts = [chr(97 + i) * length for i, length in enumerate(lengths)]
    encoded = encode_texts(texts, tokenizer, 10_000)
    assert [bytes(token_ids).decode() for token_ids in encoded] == texts
    assert together == calls


def test_the_rest_is_not_tokenized_behind_one_that_is_too_long(
    tokenizer: Tokenizer, together: list[list[int]]
):
    with pytest.raises(ContextLengthError, match="has 60 tokens"):
        encode_texts(["a" * 60] * 50, tokenizer, 50)
    assert together == [[60] * 3]


@pytest.mark.parametrize(
    ("texts", "must_fit", "is_alone"),
    [
        (["a" * 2000], True, False),
        (["a" * 1000] * 2, True, True),
        (["a" * 2000], False, True),
        (["a"] * 9, True, False),
    ],
)
async def test_huge_texts_go_one_at_a_time(
    texts: list[str], must_fit: bool, is_alone: bool, monkeypatch: pytest.MonkeyPatch
):
    """All but a single one that has to fit: most of what does not is never tokenized."""
    threads: list[str] = []

    tokenizer = byte_tokenizer()
    encode_batch = tokenizer.encode_batch

    def noticed(*arguments: Any, **options: Any) -> list[list[int]]:
        threads.append(threading.current_thread().name)
        return encode_batch(*arguments, **options)

    monkeypatch.setattr(tokenizer, "encode_batch", noticed)
    monkeypatch.setattr(async_llm, "LONG_TEXT", 5)
    monkeypatch.setattr(async_llm, "HUGE_TEXT", 1500)
    llm = AsyncLLM(
        ScriptedClient(info=scripted_info(max_model_len=5000)), tokenizer, GenerationDefaults((), {})
    )
    try:
        assert await llm.encode_batch(texts, must_fit=must_fit) == [[97] * len(text) for text in texts]
    finally:
        llm.shutdown()
    assert [name.startswith("jaxserve-huge-texts") for name in threads] == [is_alone]


def test_prompts_of_all_kinds_with_one_that_is_wrong(tokenizer: Tokenizer, together: list[list[int]]):
    prompts = ["abc", [1, 2], {"prompt": "x"}, "de"]
    first, *others, last = tokenize_texts(prompts, tokenizer, 50)
    assert (first, others, last) == (
        inputs.TokenizedPrompt([*b"abc"], "abc"),
        prompts[1:3],
        inputs.TokenizedPrompt([*b"de"], "de"),
    )
    assert together == [[3, 2]]
    for wrong in ("a" * 60, "\ud800"):
        assert tokenize_texts([*prompts, wrong], tokenizer, 50) == [*prompts, wrong]
