"""A model's parameters as programs take them, and the model again inside a program."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from jaxserve.engine.weight_pack import WeightPack
from jaxserve.kernels_pallas.matmul import from_rows
from jaxserve.kernels_pallas.metadata import Backend
from jaxserve.models.decoder import DecoderModel
from jaxserve.models.layers import CONTRACTED_AXES


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters on the device, as programs take them."""

    model: tuple[jax.Array, ...]  # of forward passes
    head: jax.Array  # of samplers: what turns hidden states into logits


class PackedModel:
    """One device's part of a model: its graph, and where each of its parameters stands in the arguments of programs."""

    def __init__(
        self,
        graphdef: nnx.GraphDef[DecoderModel],
        abstract_state: nnx.State,
        *,
        is_tied: bool,
        backend: Backend,
    ) -> None:
        """`is_tied`: the embedding is the output head as well."""
        self._graphdef = graphdef
        self._backend: Backend = backend
        leaves, self._treedef = jax.tree.flatten(abstract_state)
        contracted = _contracted_axes(abstract_state) if backend == "cpu" else {}
        self._pack = WeightPack.plan(leaves, contracted)
        self._leaf_specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        self._head = _find_head(abstract_state, is_tied=is_tied)
        self.specs = self._pack.specs  # of Weights.model
        self.head_spec = self._pack.leaf_spec(self._head)  # of Weights.head

    def pack(self, state: nnx.State) -> Weights:
        """A model's parameters as the programs take them."""
        model = self._pack.pack(jax.tree.leaves(state))
        head = self._pack.leaf(model, self._head)
        sharding = self.head_spec.sharding
        return Weights(model, head if sharding is None else jax.device_put(head, sharding))

    def model(self, weights: tuple[jax.Array, ...]) -> DecoderModel:
        """Inside a program: the model of Weights.model."""
        leaves = self._pack.unpack(weights, keep_stacks=self._backend == "gpu")
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def head_model(self, head: jax.Array) -> DecoderModel:
        """Inside a program: a model of Weights.head that can do nothing but `logits`, all else being shapes."""
        leaves: list[jax.Array | jax.ShapeDtypeStruct] = [*self._leaf_specs]
        axes = self._pack.contracted.get(self._head)
        leaves[self._head] = head if axes is None else from_rows(head, *axes)
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))


def _find_head(abstract_state: nnx.State, *, is_tied: bool) -> int:
    """Index of the leaf that DecoderModel.logits multiplies with."""
    name = "embedding" if is_tied else "lm_head"
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
    (index,) = (i for i, path in enumerate(paths) if getattr(path[0], "key", None) == name)
    return index


def _contracted_axes(abstract_state: nnx.State) -> dict[int, tuple[int, int]]:
    """Of each leaf that products read: which of its axes they contract, as matmul.to_rows wants to know it."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
    names = [[str(getattr(key, "key", getattr(key, "name", ""))) for key in path] for path in paths]
    known = [next((name for name in path if name in CONTRACTED_AXES), None) for path in names]
    return {index: CONTRACTED_AXES[name] for index, name in enumerate(known) if name is not None}
