"""Models that see give the logits of transformers' code, which goldens hold: tower, M-RoPE and all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.errors import CheckpointError
from jaxserve.loading.weights import load_model
from jaxserve.models.layout import plan_layout
from jaxserve.models.on_devices import abstract_on_mesh
from jaxserve.models.parameters import abstract_model
from jaxserve.models.registry import build_language_model
from jaxserve.models.sharding import abstract_mesh
from jaxserve.models.towers import split_tower
from tests.models.vision_cases import CONFIGS, NUM_LOGITS, TURNS, Turn, checkpoint, goldens
from tests.models.vision_run import SeeingModel

DTYPE = jnp.dtype("float32")


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> SeeingModel:
    return SeeingModel(nnx.merge(*load_model(checkpoint(family), DTYPE, progress=False)))


@pytest.mark.parametrize("title", TURNS)
def test_logits_and_greedy_tokens(family: str, model: SeeingModel, title: str) -> None:
    turn, golden = TURNS[title], goldens()[family][title]
    token_ids = golden["token_ids"]
    logits = model.logits(Turn([*turn.token_ids, *token_ids[:-1]], turn.images))[len(turn.token_ids) - 1 :]
    np.testing.assert_allclose(logits[0, :NUM_LOGITS], golden["logits"], atol=1e-4, rtol=0)
    assert logits.argmax(axis=-1).tolist() == token_ids


def test_tower_and_language_model_are_the_whole(family: str) -> None:
    config = checkpoint(family).config
    whole = abstract_model(config, DTYPE)[1]
    language, tower = split_tower(whole)
    assert tower is not None
    own = nnx.split(nnx.eval_shape(lambda: build_language_model(config, DTYPE)))[1]
    assert [path for path, _ in nnx.to_flat_state(own)] == [path for path, _ in nnx.to_flat_state(language)]
    sizes: dict[str, set[int]] = {}
    for _, parameter in nnx.to_flat_state(tower):
        axes = parameter.get_metadata()["axes"]
        assert len(set(axes)) == len(axes) == len(parameter.shape)
        for axis, size in zip(axes, parameter.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
    assert all(len(found) == 1 for found in sizes.values()), "an axis of one name has one size"


@pytest.mark.parametrize("num_devices", [2, 4])
def test_devices_share_the_tower(family: str, num_devices: int) -> None:
    layout = plan_layout(checkpoint(family).config, num_devices)
    tower = split_tower(abstract_on_mesh(layout, DTYPE, abstract_mesh(num_devices, 1))[1])[1]
    assert tower is not None
    leaves = jax.tree.leaves(tower)
    divided = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    assert divided > 0.9 * sum(leaf.size for leaf in leaves)


def test_tables_are_strict_about_the_tower(family: str) -> None:
    broken = checkpoint(family)
    del broken.weights["visual.blocks.2.attn.qkv.bias"]
    broken.weights["visual.blocks.3.norm1.weight"] = np.zeros(48, np.float32)
    with pytest.raises(CheckpointError) as error:
        load_model(broken, DTYPE, progress=False)
    assert "missing (1): visual.blocks.2.attn.qkv.bias" in str(error.value)
    assert "no place for (1): visual.blocks.3.norm1.weight" in str(error.value)
