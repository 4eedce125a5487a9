"""Tokenizers read from Hugging Face directories."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import CheckpointError
from jaxserve.text.tokenizer import load_tokenizer
from tests.tiny import BOS, EOS, VOCAB_SIZE, byte_tokenizer

DATA = Path(__file__).parents[1] / "data" / "text"


def write_directory(path: Path, config: dict[str, Any] | None = None, *, add_bos: bool = False) -> Path:
    byte_tokenizer(add_bos=add_bos).backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_special_tokens_as_text_or_object_and_from_the_map(tmp_path: Path) -> None:
    write_directory(tmp_path, {"bos_token": {"content": "<|bos|>", "special": True}, "pad_token": None})
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|eos|>", "pad_token": "<|im_end|>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|im_end|>",
    }
    assert tokenizer.encode("a") == [97]


@pytest.mark.parametrize(
    ("says", "in_file", "ids"),
    [
        ({}, True, [BOS, 97]),
        ({}, False, [97]),
        ({"add_bos_token": True}, False, [BOS, 97]),
        ({"add_bos_token": False}, True, [97]),
        ({"add_bos_token": True, "add_eos_token": True}, False, [BOS, 97, EOS]),
    ],
)
def test_the_configuration_wins_over_the_post_processor(
    tmp_path: Path, says: dict[str, bool], in_file: bool, ids: list[int]
) -> None:
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", **says}
    assert load_tokenizer(write_directory(tmp_path, config, add_bos=in_file)).encode("a") == ids


def test_add_bos_without_a_bos_token_is_off(tmp_path: Path) -> None:
    assert load_tokenizer(write_directory(tmp_path, {"add_bos_token": True})).encode("a") == [97]


def test_tokens_listed_only_in_the_configuration_are_added(tmp_path: Path) -> None:
    entry = {"content": "<|new|>", "special": True, "normalized": False}
    tokenizer = load_tokenizer(
        write_directory(
            tmp_path, {"added_tokens_decoder": {str(VOCAB_SIZE): entry, "257": {"content": "<|eos|>"}}}
        )
    )
    assert tokenizer.encode("a<|new|>") == [97, VOCAB_SIZE]
    assert VOCAB_SIZE in tokenizer.special_ids


def test_a_listed_token_that_gets_another_id_is_refused(tmp_path: Path) -> None:
    write_directory(tmp_path, {"added_tokens_decoder": {"999": {"content": "<|new|>"}}})
    with pytest.raises(CheckpointError, match=r"'<\|new\|>' should have id 999"):
        load_tokenizer(tmp_path)


def test_chat_templates_and_which_file_wins(tmp_path: Path) -> None:
    assert load_tokenizer(write_directory(tmp_path)).chat_template is None
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "T"}]
    write_directory(tmp_path, {"chat_template": named})
    assert load_tokenizer(tmp_path).chat_templates == {"default": "A", "tool_use": "T"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "B"}))
    assert load_tokenizer(tmp_path).chat_template == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load_tokenizer(tmp_path).chat_templates == {"default": "C", "tool_use": "T", "rag": "R"}


def test_a_sentencepiece_only_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((DATA / "spm_prefix.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    ids = tokenizer.encode("Hello world")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == "Hello world"


def test_faults_are_told_by_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json and no SentencePiece"):
        load_tokenizer(tmp_path)
    write_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, not a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "no"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a usable"):
        load_tokenizer(tmp_path)
