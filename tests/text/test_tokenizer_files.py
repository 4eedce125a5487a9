"""A tokenizer that is written as a Hugging Face directory and read again is the same one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.text.gguf_tokenizer import parts_from_gguf
from jaxserve.text.hf_tokenizer import parts_from_directory
from jaxserve.text.tokenizer_files import tokenizer_files
from jaxserve.text.tokenizer_parts import TokenizerParts
from tests.text.test_gguf_tokenizer import fields


def written_and_read(parts: TokenizerParts, directory: Path) -> TokenizerParts:
    for name, data in tokenizer_files(parts).items():
        (directory / name).write_bytes(data)
    return parts_from_directory(directory)


@pytest.mark.parametrize(
    "templates",
    [
        {},
        {"tokenizer.chat_template": "{{ 'ä' }}\n"},
        {"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "T"},
    ],
)
@pytest.mark.parametrize("special", [{}, {"bos_token_id": 258, "add_bos_token": True, "add_eos_token": True}])
def test_all_of_it_comes_back(templates: dict[str, str], special: dict[str, object], tmp_path: Path) -> None:
    parts = parts_from_gguf(fields(padding_token_id=258, **special) | templates)
    found = written_and_read(parts, tmp_path)
    assert json.loads(found.backend.to_str()) == json.loads(parts.backend.to_str())
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos", "add_eos", "chat_templates"):
        assert getattr(found, name) == getattr(parts, name), name
