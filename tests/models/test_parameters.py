"""Random parameters are reproducible."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.parameters import dummy_model
from tests.models.golden import read_golden

DTYPE = jnp.dtype("float32")


def test_dummy_weights_depend_on_seed_and_path_alone() -> None:
    config = read_golden("qwen3_biases").checkpoint.config
    shorter = replace(config, num_layers=1, layer_windows=(None,))

    def dummy(config: ModelConfig, seed: int) -> DecoderModel:
        return nnx.merge(*dummy_model(config, DTYPE, seed))

    model = dummy(config, 3)
    qkv = [layer.attention.qkv[...] for layer in model.layers]
    np.testing.assert_array_equal(dummy(shorter, 3).layers[0].attention.qkv[...], qkv[0])
    assert not np.array_equal(dummy(shorter, 4).layers[0].attention.qkv[...], qkv[0])
    assert not np.array_equal(qkv[1], qkv[0])
    assert 0.015 < float(jnp.std(qkv[0])) < 0.025
    np.testing.assert_array_equal(model.norm.scale[...], 1)
