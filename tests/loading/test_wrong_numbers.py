"""Whatever stands in a checkpoint's metadata where a number belongs: a config, or an error that names the key."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError
from jaxserve.loading.gguf_config import model_config_from_gguf
from jaxserve.loading.hf_config import generation_defaults_from_hf, model_config_from_hf
from jaxserve.models.rope_frequencies import rope_frequencies
from tests.loading import published
from tests.loading import test_gguf_config as gguf

WRONG = [
    0,
    -1,
    2**31,
    2**63,
    2**70,
    -(2**70),
    10**400,
    1.5,
    1e308,
    math.inf,
    math.nan,
    "8",
    None,
    [],
    {},
    True,
]
OURS = {
    "mscale": "attention_factor",
    "in_chans": "in_channels",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.scaling.factor": "rope scaling by",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_attn_factor": "attention_factor",
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
HF = {
    "llama": published.LLAMA,
    "linear": published.LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": published.MISTRAL,
    "qwen2": published.QWEN2 | {"use_sliding_window": True},
    "yarn": published.QWEN2 | {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.1}},
    "yarn with mscale": published.QWEN2 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn without a factor": published.QWEN2
    | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8192}},
    "qwen3": published.QWEN3,
    "mixtral": published.MIXTRAL,
    "qwen3_moe": published.QWEN3_MOE,
    "qwen2_5_vl": published.QWEN2_5_VL,
    "qwen2_5_vl, nested": published.nested(published.QWEN2_5_VL),
    "qwen2_vl": published.QWEN2_5_VL
    | {"architectures": ["Qwen2VLForConditionalGeneration"]}
    | {"vision_config": {"depth": 4, "embed_dim": 64, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 4}},
}  # fmt: skip
YARN_KEYS = ("factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow", "yarn_attn_factor")
GGUF = {
    "llama": gguf.LLAMA,
    "yarn": gguf.LLAMA
    | {"llama.rope.scaling.type": "yarn"}
    | dict(zip([f"llama.rope.scaling.{key}" for key in YARN_KEYS], [4.0, 8192, 32.0, 1.0, 1.0], strict=True)),
    "experts": gguf.LLAMA | {f"llama.{key}": value for key, value in gguf.EXPERTS.items()},
    "sliding": gguf.LLAMA | {"llama.attention.sliding_window": 4096},
}


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where numbers stand in a value, and lists of them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, (*path, key))
    elif isinstance(value, list) and value and not isinstance(value[0], str):
        yield path
        for i, inner in enumerate(value):
            yield from numbers(inner, (*path, i))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def replaced(value: dict[str, Any], path: tuple[Any, ...], new: Any) -> dict[str, Any]:
    value = inner = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def said(read: Callable[[dict[str, Any]], ModelConfig], values: dict[str, Any]) -> str | None:
    """How values are refused; None if they are a config, which then has positions."""
    try:
        model = read(values)
    except CheckpointError as error:
        return str(error)
    frequencies, factor = rope_frequencies(model)
    assert math.isfinite(factor + frequencies.sum())
    return None


def is_named(key: str, refusal: str | None) -> bool:
    """Whether a refusal, if there is one, speaks of a key: by its own name or that of our config."""
    return refusal is None or key in refusal or OURS.get(key, key) in refusal


def test_config_json() -> None:
    def read(config: dict[str, Any]) -> ModelConfig:
        generation_defaults_from_hf(None, config)
        return model_config_from_hf(config, "config.json")

    for name, config in HF.items():
        assert said(read, config) is None
        for path in numbers(config):
            key = [part for part in path if isinstance(part, str)][-1]
            for wrong in WRONG:
                refusal = said(read, replaced(config, path, wrong))
                assert is_named(key, refusal), (name, path, wrong, refusal)


def test_gguf() -> None:
    def read(fields: dict[str, Any]) -> ModelConfig:
        return model_config_from_gguf(fields, gguf.TENSORS, "m.gguf")

    for name, fields in GGUF.items():
        assert said(read, fields) is None
        for path in numbers(fields):
            key = path[0].removeprefix("llama.")
            for wrong in WRONG:
                refusal = said(read, replaced(fields, path, wrong))
                assert is_named(key, refusal), (name, path, wrong, refusal)
