"""A config.json made from our own config says the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.loading.hf_config import generation_defaults_from_hf, model_config_from_hf
from jaxserve.loading.hf_export import hf_config_of, hf_generation_config_of
from tests.models.golden import NAMES, read_golden


def config_of(golden: str) -> ModelConfig:
    return read_golden(golden).checkpoint.config


@pytest.mark.parametrize("golden", NAMES)
def test_every_family_and_rope_scaling(golden: str) -> None:
    config = config_of(golden)
    assert model_config_from_hf(hf_config_of(config, "here"), "there") == config


def test_what_the_format_cannot_say() -> None:
    with pytest.raises(CheckpointError, match=r"here: .* LlamaForCausalLM cannot say that qkv_bias is True"):
        hf_config_of(replace(config_of("llama"), qkv_bias=True), "here")
    windows = (4, 8, None)
    with pytest.raises(CheckpointError, match=r"cannot say that layer_windows is \(4, 8, None\)"):
        hf_config_of(replace(config_of("qwen2_window"), layer_windows=windows), "here")


@pytest.mark.parametrize("ids", [(), (5,), (5, 7)])
def test_end_tokens(ids: tuple[int, ...]) -> None:
    defaults = GenerationDefaults(ids)
    assert generation_defaults_from_hf(hf_generation_config_of(defaults), {"eos_token_id": 99}) == (
        defaults if ids else GenerationDefaults((99,))
    )
