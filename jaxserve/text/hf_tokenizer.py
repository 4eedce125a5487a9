"""A tokenizer out of a Hugging Face model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxserve.errors import CheckpointError
from jaxserve.loading.json_file import read_json_object
from jaxserve.text.pieces import PieceType
from jaxserve.text.sentencepiece import sentencepiece_backend
from jaxserve.text.sentencepiece_file import read_sentencepiece_model
from jaxserve.text.tokenizer_parts import TokenizerParts


def parts_from_directory(path: Path) -> TokenizerParts:
    """Read tokenizer.json (or a SentencePiece tokenizer.model) and the configuration files beside it.

    Raises:
        CheckpointError: no tokenizer is there, or a file of it is damaged or of an unsupported kind (named).
    """
    config = _read_json(path / "tokenizer_config.json")
    special = _read_json(path / "special_tokens_map.json") | {
        k: v for k, v in config.items() if v is not None
    }
    bos, eos = _content(special.get("bos_token")), _content(special.get("eos_token"))
    # transformers' rule: what the configuration says outright wins over tokenizer.json's post-processor.
    add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
    if (path / "tokenizer.json").is_file():
        backend = _read_tokenizer_json(path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        model = read_sentencepiece_model(path / "tokenizer.model")
        backend = sentencepiece_backend(model)
        control = [p for p, kind in zip(model.pieces, model.types, strict=True) if kind == PieceType.CONTROL]
        bos = bos or ("<s>" if "<s>" in control else None)
        eos = eos or ("</s>" if "</s>" in control else None)
        add_bos = True if add_bos is None else add_bos  # as transformers' LlamaTokenizer
    else:
        raise CheckpointError(
            f"{path}: no tokenizer.json and no SentencePiece tokenizer.model in this directory; for other "
            "tokenizers write a tokenizer.json first: "
            "transformers.AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    _add_listed_tokens(backend, config, path)
    return TokenizerParts(
        backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=_content(special.get("pad_token")),
        unk_token=_content(special.get("unk_token")),
        add_bos=add_bos and bos is not None,
        add_eos=add_eos and eos is not None,
        chat_templates=_chat_templates(path, config),
    )


def _read_tokenizer_json(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise CheckpointError(f"{path}: not a usable tokenizer.json: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _content(token: str | dict[str, Any] | None) -> str | None:
    """A special token is written as its text or as an object with flags."""
    return token["content"] if isinstance(token, dict) else token


def _add_listed_tokens(backend: Backend, config: dict[str, Any], path: Path) -> None:
    """Add tokens that tokenizer_config.json lists and the vocabulary lacks; each must get its listed id."""
    listed = config.get("added_tokens_decoder") or {}
    for token_id, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        flags = {
            name: entry[name]
            for name in ("lstrip", "rstrip", "normalized", "single_word", "special")
            if name in entry
        }
        if backend.get_added_tokens_decoder().get(int(token_id)) is not None:
            continue
        backend.add_tokens([AddedToken(entry["content"], **flags)])
        if backend.token_to_id(entry["content"]) != int(token_id):
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: added token {entry['content']!r} should have id "
                f"{token_id}, but the vocabulary gives it {backend.token_to_id(entry['content'])}"
            )


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name.  A .jinja file wins over chat_template.json, and that over tokenizer_config.json."""
    templates: dict[str, str] = {}
    for source in (config, _read_json(path / "chat_template.json")):
        value = source.get("chat_template")
        if isinstance(value, str):
            templates["default"] = value
        elif isinstance(value, list):
            templates |= {entry["name"]: entry["template"] for entry in value}
    if (path / "chat_template.jinja").is_file():
        templates["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    return templates
