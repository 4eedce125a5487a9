"""Makes the golden files beside it: tiny random models of every family, and the logits transformers gives.

Run by hand, with torch and transformers installed: python tests/models/make_goldens.py [NAME …]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

NUM_TOKENS = 40
SIZES = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama_biases_tied_linear": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_parameters": LINEAR,
        },
    ),
    "llama3_rope": ("Llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "mistral_window": ("Mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "mistral_full": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2_window": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}),
    "mixtral_window": (
        "Mixtral",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "sliding_window": 6,
            "head_dim": 16,
            "num_hidden_layers": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "num_hidden_layers": 2,
        },
    ),
    # Layer 1 and 3 would have experts, but 3 is told not to.
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "num_hidden_layers": 4,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
}


def main() -> None:
    """Write goldens/NAME.npz for each case named, or all: config.json, weights (float16, exact), token ids, logits."""
    directory = Path(__file__).with_name("goldens")
    directory.mkdir(exist_ok=True)
    for seed, (name, (family, extra)) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **extra})
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).eval()
        randomise(model)
        token_ids = torch.randint(config.vocab_size, (1, NUM_TOKENS))
        with torch.no_grad():
            logits = model(token_ids).logits[0]
        config.architectures = [f"{family}ForCausalLM"]
        # As save_pretrained writes it, so that the config reader meets the real layout.
        saved = json.loads(config.to_json_string(use_diff=True))
        path = directory / f"{name}.npz"
        np.savez_compressed(
            path,
            config=json.dumps(saved),
            token_ids=token_ids[0].numpy().astype(np.int32),
            logits=logits.numpy(),
            **{f"weight:{key}": value for key, value in stored_weights(model).items()},
        )
        print(path.name, path.stat().st_size, "bytes, logits up to", float(logits.abs().max()))


def randomise(model: torch.nn.Module) -> None:
    """Set weights large enough that every part shows in the logits; float16 holds them."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        else:
            value = noise * (1.5 / parameter.shape[-1] ** 0.5)
        parameter.data = value.to(torch.float16).to(torch.float32)
    model.tie_weights()


def stored_weights(model: Any) -> dict[str, np.ndarray]:
    """The weights under the names that checkpoints have for them: transformers keeps experts under others."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            name: value.astype(np.float16)
            for name, value in load_file(Path(folder, "model.safetensors")).items()
        }


if __name__ == "__main__":
    main()
