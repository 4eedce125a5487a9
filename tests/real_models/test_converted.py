"""SmolLM2 converted: the same answers as from the file it came in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.conversion.convert import convert
from tests.real_models.test_goldens import agreed_length, read_goldens

pytestmark = pytest.mark.real_model

NUM_PROMPTS, NUM_TOKENS = 4, 16


def test_golden_answers(
    model_file: Callable[[str], Path], open_llm: Callable[[Path], LLM], tmp_path: Path
) -> None:
    convert(str(model_file("smollm2")), tmp_path / "converted", progress=False)
    goldens = read_goldens("smollm2")[-NUM_PROMPTS:]  # chats
    with open_llm(tmp_path / "converted") as llm:
        tokenizer = llm.get_tokenizer()
        assert tokenizer.chat_template is not None
        for golden in goldens:
            assert tokenizer.encode(golden.text, add_special_tokens=False) == golden.prompt_ids
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate([golden.prompt_ids for golden in goldens], params, use_tqdm=False)
    for golden, output in zip(goldens, outputs, strict=True):
        assert agreed_length(golden, output) == NUM_TOKENS, golden.name
