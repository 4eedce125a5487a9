"""Reads the mixture of experts of a Hugging Face config, and writes it."""

from __future__ import annotations

from typing import Any

from jaxserve.config import ExpertsConfig
from jaxserve.loading.fields import Fields


def no_experts(fields: Fields, num_layers: int) -> None:
    """Of architectures without experts."""
    del fields, num_layers


def mixtral_experts(fields: Fields, num_layers: int) -> ExpertsConfig:
    """Experts in every layer, as wide as intermediate_size; a token's weights always add up to 1."""
    return ExpertsConfig(
        num_experts=fields.integer("num_local_experts", least=1),
        num_per_token=fields.integer("num_experts_per_tok", least=1),
        intermediate_size=fields.integer("intermediate_size", least=1),
        renormalize=True,
        layers=(True,) * num_layers,
    )


def qwen3_moe_experts(fields: Fields, num_layers: int) -> ExpertsConfig:
    """Experts in every decoder_sparse_step-th layer, save those of mlp_only_layers."""
    # Published under the one name; transformers 5 writes the other.
    count = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    step = fields.integer("decoder_sparse_step", least=1)
    dense = fields.integers("mlp_only_layers") if fields.has("mlp_only_layers") else []
    return ExpertsConfig(
        num_experts=fields.integer(count, least=1),
        num_per_token=fields.integer("num_experts_per_tok", least=1),
        intermediate_size=fields.integer("moe_intermediate_size", least=1),
        renormalize=fields.boolean("norm_topk_prob"),
        layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers)),
    )


def experts_to_hf(experts: ExpertsConfig) -> dict[str, Any]:
    """The keys that either of these architectures reads back as `experts`."""
    return {
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_sparse in enumerate(experts.layers) if not is_sparse],
    }
