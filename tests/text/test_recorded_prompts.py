"""Prompts of two real models: the token counts and ids that vLLM 0.32 answered to the same requests."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.loading.fetch import models_directory
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

CASES = json.loads((Path(__file__).parents[1] / "data" / "text" / "recorded_prompts.json").read_text())

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """Those whose files are there."""
    loaded: dict[str, Tokenizer] = {}
    for name, part in (("smollm2", "smollm2-135m"), ("qwen", "qwen2.5-coder-0.5b")):
        for path in models_directory().glob(f"{part}*.gguf"):
            loaded[name] = load_tokenizer(path)
    return loaded


def pick(tokenizers: dict[str, Tokenizer], case: dict[str, Any]) -> Tokenizer:
    if case["model"] not in tokenizers:
        pytest.skip(f"no {case['model']} in {models_directory()}")
    return tokenizers[case["model"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_prompt_ids(tokenizers: dict[str, Tokenizer], case: dict[str, Any]) -> None:
    tokenizer = pick(tokenizers, case)
    if "prompt" in case:
        ids = tokenizer.encode(case["prompt"], case.get("add_special_tokens", True))
    else:
        assert tokenizer.chat_template is not None
        prompt = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens).render(
            case["messages"],
            tools=case.get("tools"),
            add_generation_prompt=case.get("add_generation_prompt", True),
            continue_final_message=case.get("continue_final_message", False),
        )
        ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert len(ids) == case["count"]
    assert ids == case.get("token_ids", ids)
    if "token_strs" in case:
        assert tokenizer.convert_ids_to_tokens(ids) == case["token_strs"]


@pytest.mark.parametrize("case", [c for c in CASES if "answer" in c], ids=lambda case: case["name"])
def test_answers_token_by_token(tokenizers: dict[str, Tokenizer], case: dict[str, Any]) -> None:
    detokenizer = Detokenizer(pick(tokenizers, case), case["token_ids"])
    texts = [detokenizer.push([token_id]) for token_id in case["answer_ids"]]
    assert "".join(texts) == case["answer"]
    assert "\ufffd" not in "".join(texts)


def test_the_librarys_decoder_agrees(tokenizers: dict[str, Tokenizer]) -> None:
    text = "naïve café — 你好 🎉👩‍👩‍👧 \t\n def f(x):\n    return x  # 123"
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids) == text
        every = list(range(tokenizer.vocab_size))
        assert tokenizer.decode(every, False) == tokenizer.backend.decode(every, skip_special_tokens=False)
