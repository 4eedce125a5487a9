"""Constrained answers of a real model: they follow, end, and are what the tokenizer would write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams, StructuredOutputsParams
from jaxserve.structured.vocabulary import build_vocabulary
from jaxserve.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.real_model

CITY = {
    "type": "object",
    "properties": {
        "city_name": {"type": "string", "maxLength": 30},
        "population_in_thousands": {"type": "integer", "minimum": 0, "maximum": 50000},
        "continent": {"enum": ["Europe", "Asia", "Africa", "America", "Australia"]},
    },
    "required": ["city_name", "population_in_thousands", "continent"],
    "additionalProperties": False,
}


def test_json_of_a_real_model(model_file: Callable[[str], Path], open_llm: Callable[..., LLM]) -> None:
    import jsonschema  # here, so that machines without development packages can collect this file

    question = [{"role": "user", "content": "Describe the capital of France as JSON."}]
    with open_llm(model_file("smollm2")) as llm:
        params = [
            SamplingParams(
                temperature=temperature,
                seed=5,
                max_tokens=120,
                logprobs=logprobs,
                structured_outputs=StructuredOutputsParams(json=CITY),
            )
            for temperature, logprobs in ((0.0, None), (0.0, 0), (1.0, None), (1.0, 0))
        ]
        answers = [output.outputs[0] for output in llm.chat([question] * 4, params, use_tqdm=False)]
        for answer in answers:
            assert answer.finish_reason == "stop"
            jsonschema.validate(json.loads(answer.text), CITY)
        # Forced tokens are the same, run at once or sampled one by one.
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[2].token_ids == answers[3].token_ids
        capitals = StructuredOutputsParams(
            choice=["The capital of France is Rome.", "The capital of France is Paris."]
        )
        (choice,) = llm.chat(
            [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
            SamplingParams(structured_outputs=capitals, temperature=0.0),
            use_tqdm=False,
        )
        assert choice.outputs[0].text == "The capital of France is Paris."


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-coder-0.5b"])
def test_the_vocabulary_tokenizes_as_the_tokenizer(name: str, model_file: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(model_file(name))
    assert tokenizer.eos_token_id is not None
    vocabulary: Any = build_vocabulary(tokenizer, tokenizer.vocab_size + 10, (tokenizer.eos_token_id,))
    for text in ('{"city_name": "São Paulo"}', "naïve  café\n\n\t1234567", "日本語 🎉", " leading"):
        wanted = tokenizer.encode(text, add_special_tokens=False)
        assert vocabulary.tokenize_str(text) == wanted
        assert vocabulary.decode_bytes(wanted) == text.encode()
    assert vocabulary.is_special_token(tokenizer.eos_token_id)
    mark = "<|im_end|>"
    assert vocabulary.decode_str(vocabulary.tokenize_str(f"a{mark}")) == f"a{mark}"
    assert tokenizer.token_to_id(mark) not in vocabulary.tokenize_str(f"a{mark}")
