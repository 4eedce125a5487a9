"""SentencePiece BPE against recordings of SentencePiece itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import CheckpointError
from jaxserve.text.pieces import PieceType
from jaxserve.text.sentencepiece_file import read_sentencepiece_model
from jaxserve.text.tokenizer import Tokenizer, tokenizer_from_gguf

DATA = Path(__file__).parents[1] / "data" / "text"


def gguf_fields(name: str) -> dict[str, Any]:
    """The metadata that llama.cpp's converter would write for a model."""
    model = read_sentencepiece_model(DATA / f"{name}.model")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(model.pieces),
        "tokenizer.ggml.scores": list(model.scores),
        "tokenizer.ggml.token_type": list(model.types),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
    }


@pytest.fixture(scope="module", params=["spm_prefix", "spm_no_prefix"])
def named_tokenizer(request: pytest.FixtureRequest) -> tuple[str, Tokenizer]:
    return request.param, tokenizer_from_gguf(gguf_fields(request.param))


def test_encodes_as_sentencepiece_does(named_tokenizer: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named_tokenizer
    cases = json.loads((DATA / f"{name}.json").read_text())
    assert len(cases) > 90
    for case in cases:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.decode(case["ids"]) == tokenizer.backend.decode(case["ids"])


def test_bos_is_put_by_default_and_specials_are_known(named_tokenizer: tuple[str, Tokenizer]) -> None:
    tokenizer = named_tokenizer[1]
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.special_ids == {0, 1, 2}
    tool = tokenizer.token_to_id("<|tool|>")
    assert tool in tokenizer.added_ids
    assert tool in tokenizer.encode("a<|tool|>b")


def test_a_run_of_byte_tokens_keeps_its_valid_characters(named_tokenizer: tuple[str, Tokenizer]) -> None:
    tokenizer = named_tokenizer[1]
    byte = {i: tokenizer.token_to_id(f"<0x{i:02X}>") for i in range(256)}
    ids = [i for b in "你".encode() + b"\xff" if (i := byte[b]) is not None]
    assert tokenizer.decode(ids) == "你\ufffd"


def test_files_that_are_not_sentencepiece_bpe_are_refused(tmp_path: Path) -> None:
    whole = (DATA / "spm_prefix.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    for damaged in (b"", b"IQ== 0\nIg== 1\n", whole[:1000], b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a SentencePiece model, or damaged"):
            read_sentencepiece_model(path)
    piece = b"\x0a\x03\x0a\x01a"
    path.write_bytes(piece + b"\x12\x02\x18\x01")
    with pytest.raises(CheckpointError, match="model_type 1 is not supported"):
        read_sentencepiece_model(path)
    path.write_bytes(piece + b"\x12\x02\x18\x02" + b"\x1a\x09\x0a\x04nfkc\x12\x01x")
    with pytest.raises(CheckpointError, match="normalizer 'nfkc' is not supported"):
        read_sentencepiece_model(path)


def test_gguf_scores_must_fit() -> None:
    fields = gguf_fields("spm_prefix")
    with pytest.raises(CheckpointError, match="scores has 3 entries"):
        tokenizer_from_gguf(fields | {"tokenizer.ggml.scores": [0.0, 0.0, 0.0]})
    with pytest.raises(CheckpointError, match="token_type has 1 entries"):
        tokenizer_from_gguf(fields | {"tokenizer.ggml.token_type": [PieceType.NORMAL]})
