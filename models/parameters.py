"""A model's parameters without a checkpoint: their shapes and names, and random ones to measure with."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.config import ModelConfig
from jaxserve.models.registry import build_model
from jaxserve.models.weight_table import ParameterPath

DUMMY_STD = 0.02  # of random parameters


def abstract_model(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """Graph and parameter shapes, dtypes and axes of a model; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: build_model(config, dtype)))


def parameter_name(path: ParameterPath) -> str:
    """A parameter's path as checkpoints in our own layout write it: "layers.3.attention.qkv"."""
    return ".".join(map(str, path))


def dummy_model(config: ModelConfig, dtype: jnp.dtype, seed: int) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """A model with random weights, for measuring without a checkpoint."""
    graphdef, abstract = abstract_model(config, dtype)
    return graphdef, dummy_weights(abstract, seed)


def dummy_weights(abstract: nnx.State, seed: int) -> nnx.State:
    """Random parameters made on the default device: norm scales 1, all else normal with deviation 0.02.

    A parameter depends on the seed, its path, shape and dtype alone, whatever else the model has.
    """
    key = jax.random.key(seed)

    def fill(path: ParameterPath, parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        if path[-1] == "scale":
            return parameter.replace(jnp.ones(parameter.shape, parameter.dtype))
        own_key = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
        value = jax.random.normal(own_key, parameter.shape, parameter.dtype)
        return parameter.replace(value * jnp.asarray(DUMMY_STD, parameter.dtype))

    return nnx.from_flat_state([(path, fill(path, value)) for path, value in nnx.to_flat_state(abstract)])
