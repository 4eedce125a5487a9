"""A tokenizer out of a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.loading.gguf_fields import array_of, special_token
from jaxserve.text.byte_level import byte_level_backend, pre_tokenizer_named
from jaxserve.text.pieces import PieceType, added_tokens, vocabulary
from jaxserve.text.sentencepiece import SentencePieceModel, sentencepiece_backend
from jaxserve.text.tokenizer_parts import TokenizerParts

_TEMPLATE = "tokenizer.chat_template"


def parts_from_gguf(fields: Mapping[str, Any]) -> TokenizerParts:
    """Build the tokenizer that `tokenizer.ggml.*` describes.

    Raises:
        CheckpointError: a field is missing or wrong, or the kind of tokenizer is not supported (named).
    """
    kind = _need(fields, "tokenizer.ggml.model")
    tokens: list[str] = _need_array(fields, "tokenizer.ggml.tokens", str)
    types: list[int] = array_of(fields, "tokenizer.ggml.token_type", int) or [PieceType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    if kind == "gpt2":
        pre_tokenizer = pre_tokenizer_named(fields.get("tokenizer.ggml.pre", "default"))
        merges = [_split_merge(merge) for merge in _need_array(fields, "tokenizer.ggml.merges", str)]
        backend = byte_level_backend(vocabulary(tokens, types), merges, pre_tokenizer)
        backend.add_tokens(added_tokens(tokens, types))
        adds_bos = pre_tokenizer.add_bos
    elif kind == "llama":
        scores: list[float] = _need_array(fields, "tokenizer.ggml.scores", float)
        if len(scores) != len(tokens):
            raise CheckpointError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
        prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
        backend = sentencepiece_backend(SentencePieceModel(tokens, scores, types, prefix))
        adds_bos = True
    else:
        raise CheckpointError(
            f"tokenizer.ggml.model={kind!r} is not supported; gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE) are. Give a directory with tokenizer.json as the tokenizer instead"
        )
    bos, eos = _named(fields, tokens, "bos"), _named(fields, tokens, "eos")
    return TokenizerParts(
        backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=_named(fields, tokens, "padding"),
        unk_token=_named(fields, tokens, "unknown"),
        add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", adds_bos and bos is not None)),
        add_eos=bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        chat_templates=_chat_templates(fields),
    )


def _need(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise CheckpointError(f"the GGUF metadata lacks {name}: the file has no (complete) tokenizer in it")
    return fields[name]


def _need_array(fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    _need(fields, name)
    return array_of(fields, name, kind)


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise CheckpointError(
            f"tokenizer.ggml.merges has {merge!r}; a merge is two tokens with a space between them"
        )
    return left, right


def _named(fields: Mapping[str, Any], tokens: list[str], role: str) -> str | None:
    token_id = special_token(fields, role)
    if token_id is None:
        return None
    if token_id >= len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.{role}_token_id={token_id} is outside the vocabulary of {len(tokens)}"
        )
    return tokens[token_id]


def _chat_templates(fields: Mapping[str, Any]) -> dict[str, str]:
    """The default template, and the named ones that some files put under tokenizer.chat_template.NAME."""
    templates = {"default": fields[_TEMPLATE]} if _TEMPLATE in fields else {}
    for name, value in fields.items():
        if name.startswith(f"{_TEMPLATE}."):
            templates[name.removeprefix(f"{_TEMPLATE}.")] = value
    return templates
