"""From an EngineConfig to the parts of a front end: checkpoint, tokenizer, engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.errors import ConfigError
from jaxserve.media.policy import MediaPolicy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
    from jaxserve.engine.protocol import EngineClient
    from jaxserve.loading.checkpoint import AnyCheckpoint, GenerationDefaults
    from jaxserve.structured.compiler import GrammarCompiler
    from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What LLM and AsyncLLM are made of.  The client is not started yet."""

    client: EngineClient
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    grammars: GrammarCompiler | None = None  # that front end and engine share
    media: MediaPolicy | None = None  # which images requests may bring, if the model takes any


def assemble(config: EngineConfig, check: Callable[[Tokenizer], None] | None = None) -> EngineParts:
    """Open the checkpoint, read its tokenizer and build an in-process engine (loads weights, compiles steps).

    `check` sees the tokenizer before all that takes long; what it raises ends this.

    Imports jax here and not above, so that a front end of an engine in another process never pays for it.
    """
    from jaxserve.admission import end_token_ids
    from jaxserve.engine.replicas import build_replicas
    from jaxserve.generation_config import generation_defaults
    from jaxserve.loading.resolve import locate_tokenizer
    from jaxserve.structured.compiler import GrammarCompiler
    from jaxserve.text.tokenizer import load_tokenizer

    if config.node_rank:
        raise ConfigError(
            f"node_rank={config.node_rank}: requests are answered by rank 0; start the other hosts with jaxserve serve"
        )
    # Before the weights: these are quick, and a missing file should not cost a minute of loading.
    media = MediaPolicy.of(config)
    checkpoint, model, defaults, path = _open(config)
    defaults = generation_defaults(config, defaults)
    processor = image_processor(config, model, path)
    tokenizer = load_tokenizer(locate_tokenizer(config.tokenizer) if config.tokenizer else path)
    if check is not None:
        check(tokenizer)
    grammars = GrammarCompiler(tokenizer, model.vocab_size, end_token_ids(tokenizer, defaults))
    grammars.warm_up()
    client = build_replicas(config, checkpoint, model, grammars, processor)
    return EngineParts(client, tokenizer, defaults, grammars, media)


def follow(config: EngineConfig) -> None:
    """Be one of an engine's other hosts (node_rank above 0) until the first one ends."""
    from jaxserve.engine.hosts import session

    checkpoint, model, _, path = _open(config)
    session.follow(config, checkpoint, model, image_processor(config, model, path))


def image_processor(config: EngineConfig, model: ModelConfig, path: Path) -> ImageProcessorConfig | None:
    """How the checkpoint at `path` wants images prepared, of a model that sees.

    Raises ConfigError for bounds of the operator's (mm_processor_kwargs) that are wrong.
    """
    if model.vision is None:
        return None
    from jaxserve.loading.image_processor import read_image_processor
    from jaxserve.media.patches import operators_processor  # brings PIL

    processor = read_image_processor(path)
    operators_processor(processor, config.mm_processor_kwargs)
    return processor


def _open(config: EngineConfig) -> tuple[AnyCheckpoint | None, ModelConfig, GenerationDefaults, Path]:
    """The checkpoint, if weights are not random, and what it says: the model, its defaults and where it is."""
    from jaxserve.loading.resolve import open_checkpoint, open_config

    if config.load_format == "dummy":
        return None, *open_config(config.model, config.revision)
    checkpoint = open_checkpoint(config.model, config.load_format, config.revision)
    return checkpoint, checkpoint.config, checkpoint.defaults, checkpoint.path
