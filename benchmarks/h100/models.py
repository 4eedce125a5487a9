"""The models measured: published dimensions, random weights, a tokenizer that only has to exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


_QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_QWEN2_5_VL: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
_TOWER: dict[str, Any] = {
    "hidden_act": "silu",
    "in_chans": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
}


HF_CONFIGS: dict[str, dict[str, Any]] = {
    "8b": _LLAMA  # meta-llama/Llama-3.1-8B
    | {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": _llama3_rope(8.0),
    },
    "8b-half": _LLAMA  # over two devices, each has what each of four has of 8b; only what they exchange is two's
    | {
        "vocab_size": 64128,
        "bos_token_id": 64000,
        "eos_token_id": 64001,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 7168,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": _llama3_rope(8.0),
    },
    "1b": _LLAMA  # meta-llama/Llama-3.2-1B
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": _llama3_rope(32.0),
    },
    "mixtral": {  # mistralai/Mixtral-8x7B, whose 32 layers would be 93 GB
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 16,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3moe": _QWEN3_MOE  # Qwen/Qwen3-30B-A3B
    | {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
    },
    "tinymoe": _QWEN3_MOE  # no figure counts, as of tiny
    | {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "vocab_size": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
    },
    "vl7b": _QWEN2_5_VL  # Qwen/Qwen2.5-VL-7B-Instruct
    | {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_config": _TOWER
        | {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "tinyvl": _QWEN2_5_VL  # no figure counts, as of tiny
    | {
        "num_hidden_layers": 2,
        "hidden_size": 112,
        "intermediate_size": 128,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_start_token_id": 260,
        "vision_end_token_id": 261,
        "image_token_id": 262,
        "video_token_id": 263,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "vision_config": _TOWER
        | {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "out_hidden_size": 112,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    },
    "tiny": _LLAMA  # no figure counts: to rehearse every part without a GPU
    | {
        "vocab_size": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}


# Of models that see: Qwen/Qwen2.5-VL's preprocessor_config.json.
IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


TEXT_MODELS = tuple(name for name, config in HF_CONFIGS.items() if "vision_config" not in config)
CUT = {
    "mixtral": "16 of its 32 layers",
    "8b-half": "half of 8b's heads, MLP and vocabulary",
}  # what tables must say of a model that is not whole


def title_of(model: str) -> str:
    """The model's name, and what it lacks."""
    return f"{model} ({CUT[model]})" if model in CUT else model


# Of models that see, for benchmarks over HTTP.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_model(name: str, folder: Path) -> Path:
    """Make `folder/name` a model directory with config.json and a tokenizer of the 256 bytes; returns it.

    A model that sees also gets what says how images are prepared, their tokens, and a chat template.
    """
    config = HF_CONFIGS[name]
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    marks: dict[str, int] = {}
    if "vision_config" in config:
        text = json.dumps(IMAGE_PROCESSOR, indent=2)
        (path / "preprocessor_config.json").write_text(text, encoding="utf-8")
        (path / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
        marks = {
            "<|vision_start|>": config["vision_start_token_id"],
            "<|vision_end|>": config["vision_end_token_id"],
            "<|image_pad|>": config["image_token_id"],
        }
    tokenizer = Tokenizer(models.BPE(vocab=vocab | marks, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]  # a setter, which the stubs leave out
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]  # likewise
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokenizer.save(str(path / "tokenizer.json"))
    return path
