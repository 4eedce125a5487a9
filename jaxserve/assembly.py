"""From an EngineConfig to the parts of a front end: checkpoint, tokenizer, engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.engine.protocol import EngineClient
    from jaxserve.loading.checkpoint import GenerationDefaults
    from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What LLM and AsyncLLM are made of.  The client is not started yet."""

    client: EngineClient
    tokenizer: Tokenizer
    defaults: GenerationDefaults


def assemble(config: EngineConfig) -> EngineParts:
    """Open the checkpoint, read its tokenizer and build an in-process engine (loads weights, compiles steps).

    Imports jax here and not above, so that a front end of an engine in another process never pays for it.
    """
    from jaxserve.engine.client import build_client
    from jaxserve.loading.resolve import open_checkpoint
    from jaxserve.text.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(config)
    tokenizer = load_tokenizer(config)
    return EngineParts(build_client(config, checkpoint), tokenizer, checkpoint.defaults)
