"""Writes a tokenizer as the files of a Hugging Face directory, for checkpoints that came without them."""

from __future__ import annotations

import json
from typing import Any

from jaxserve.text.tokenizer_parts import TokenizerParts


def tokenizer_files(parts: TokenizerParts) -> dict[str, bytes]:
    """tokenizer.json, and a tokenizer_config.json with all that stands beside it; chat templates included."""
    templates: Any = [{"name": name, "template": template} for name, template in parts.chat_templates.items()]
    if set(parts.chat_templates) == {"default"}:
        templates = parts.chat_templates["default"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": parts.bos_token,
        "eos_token": parts.eos_token,
        "pad_token": parts.pad_token,
        "unk_token": parts.unk_token,
        "add_bos_token": parts.add_bos,
        "add_eos_token": parts.add_eos,
        "chat_template": templates or None,
        "clean_up_tokenization_spaces": False,
    }
    said = {name: value for name, value in config.items() if value is not None}
    return {
        "tokenizer.json": parts.backend.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(said, indent=2, ensure_ascii=False).encode(),
    }
