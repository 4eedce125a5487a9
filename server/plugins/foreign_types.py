"""Types of vLLM that parsers name in signatures and ask for, and that nothing here is an instance of."""

from __future__ import annotations

import enum


class MistralTokenizer:
    """vLLM's tokenizer over mistral-common.  Mistral models are served through `tokenizers` here."""


class ModelConfig:
    """vLLM's settings of a model."""


class ToolServer:
    """vLLM's built-in tools of /v1/responses."""


class ToolStrictLevel(enum.IntEnum):
    """How much of a call vLLM's structural tags hold, whatever the tools ask for."""

    AUTO = 0
    FUNCTION = 1
    PARAMETER = 2
