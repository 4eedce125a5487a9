"""Small models of every family, with head counts, feed-forwards and vocabularies that few meshes divide."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.config import ExpertsConfig, ModelConfig
from tests.engine.tiny_engine import TINY
from tests.models import vision_cases
from tests.models.golden import MemoryCheckpoint, random_checkpoint


def _experts(count: int, size: int, layers: tuple[bool, bool]) -> ExpertsConfig:
    return ExpertsConfig(count, num_per_token=2, intermediate_size=size, renormalize=True, layers=layers)


_UNTIED = replace(TINY, tie_word_embeddings=False, vocab_size=99)

TEXT: dict[str, ModelConfig] = {
    # SmolLM2's heads, and the biases that the family may have
    "llama": replace(
        TINY, num_heads=9, num_kv_heads=3, intermediate_size=40, qkv_bias=True, o_bias=True, mlp_bias=True
    ),
    "mistral": replace(_UNTIED, family="mistral", layer_windows=(8, 8)),
    "qwen2": replace(
        TINY, family="qwen2", num_heads=14, num_kv_heads=2, qkv_bias=True
    ),  # Qwen2.5-0.5B's heads
    "qwen3": replace(_UNTIED, family="qwen3", num_heads=6, num_kv_heads=6, qk_norm=True),
    "mixtral": replace(
        _UNTIED, family="mixtral", num_heads=8, num_kv_heads=4, experts=_experts(6, 24, (True, True))
    ),
    "qwen3_moe": replace(
        _UNTIED, family="qwen3_moe", num_heads=8, qk_norm=True, experts=_experts(8, 16, (True, False))
    ),
}
SEEING = tuple(vision_cases.CONFIGS)  # seven query heads to one key, and towers of four heads


def checkpoint(family: str) -> MemoryCheckpoint:
    """The family's model; that of a family that sees is the one of which transformers' answers are kept."""
    return random_checkpoint(family, TEXT[family]) if family in TEXT else vision_cases.checkpoint(family)
