"""Where the dimensions of a model's arrays lie on a mesh: its axes, one table of rules, and the check that they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


DATA, TENSOR, EXPERT = "data", "tensor", "expert"
# Dense dimensions lie over both: where experts have an axis to themselves, attention is still everybody's work.
MODEL_AXES = (TENSOR, EXPERT)

# From the names of dimensions, of parameters (layers.parameter) and others, to the mesh axes that divide them.
RULES: dict[str, tuple[str, ...]] = {
    "vocab": MODEL_AXES,
    "kv_heads": MODEL_AXES,
    "heads": MODEL_AXES,
    "ffn": MODEL_AXES,
    "expert": (EXPERT,),
    "expert_ffn": (TENSOR,),
    "expert_gate_up": (TENSOR,),
    "routes": (),  # every device routes for itself
    "embed": (),
    "group": (),
    "head_dim": (),
    "gate_up": (),
    # of towers that see, which are not cut as layouts say; towers.spread_tower spreads them
    "vision_channel": (),
    "vision_frame": (),
    "vision_pixel": (),
    "vision_embed": (),
    "vision_qkv": (),
    "vision_heads": (),
    "vision_head_dim": (),
    "vision_attended": (),
    "vision_gate_up": (),
    "vision_ffn": (),
    "vision_merged": (),
    "vision_merger_ffn": (),
    # of KV pages and of what the sampler remembers
    "pages": (),
    "page_tokens": (),
    "key_value": (),
    "slots": (),
}


def partition_spec(axes: Sequence[str], name: str) -> PartitionSpec:
    """Where an array with these dimensions lies.

    Raises ConfigError, which speaks of parameter `name`, for a dimension without a rule and for two that one mesh axis
    would have to divide.
    """
    owner: dict[str, str] = {}
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        if axis not in RULES:
            raise ConfigError(
                f"parameter {name}: no rule says where its dimension {axis!r} lies; there are {', '.join(RULES)}"
            )
        for mesh_axis in RULES[axis]:
            if mesh_axis in owner:
                raise ConfigError(
                    f"parameter {name}: mesh axis {mesh_axis!r} would divide both {owner[mesh_axis]!r} and {axis!r}"
                )
            owner[mesh_axis] = axis
        rule = RULES[axis]
        entries.append(rule if len(rule) > 1 else rule[0] if rule else None)
    return PartitionSpec(*entries)


def engine_mesh(devices: Sequence[Device], tensor: int, expert: int) -> Mesh:
    """The mesh of one engine: all of its devices hold the same batch, so that its data axis is 1 long."""
    return Mesh(np.array(devices, dtype=object).reshape(1, tensor, expert), (DATA, TENSOR, EXPERT))


def abstract_mesh(tensor: int, expert: int) -> AbstractMesh:
    """The same without devices, for a plan."""
    return AbstractMesh((1, tensor, expert), (DATA, TENSOR, EXPERT))


def split_devices(devices: Sequence[Device], num_replicas: int) -> list[tuple[Device, ...]]:
    """The devices of each replica along the data axis: neighbours, which have the fastest links, stay together."""
    if len(devices) % num_replicas:
        raise ConfigError(f"{len(devices)} devices cannot be divided among {num_replicas} replicas")
    size = len(devices) // num_replicas
    return [tuple(devices[start : start + size]) for start in range(0, len(devices), size)]
