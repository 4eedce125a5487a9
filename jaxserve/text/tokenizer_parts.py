"""What a checkpoint says about its tokenizer, whatever kind of file it said it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer as Backend


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """The backend of the `tokenizers` library, and what stands beside it in a checkpoint.

    `add_bos` and `add_eos` say whether encoding with special tokens puts them around the text; when both are
    None the backend's own post-processor decides.
    """

    backend: Backend
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # by name; "default" is the usual one
