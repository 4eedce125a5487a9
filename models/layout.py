"""How a model is cut into equal parts for the devices of a mesh, whatever its sizes: what is padded, what is repeated.

A key-value head that several devices need is repeated in several slots, each with a share of its query heads.  What is
added to make parts equal is zero, and contributes exactly nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.models.part import WHOLE, Part
from jaxserve.models.sharding import EXPERT, RULES, TENSOR

Box = tuple[slice, ...]  # starts and stops are numbers, steps are 1

_FFN_MULTIPLE = 16  # of a device's share: what tensor cores and vector units take at a time
_VOCAB_MULTIPLE = 32  # so that a share of a mask is whole words


@dataclass(frozen=True, slots=True)
class Move:
    """Numbers of a checkpoint's parameter, and where they stand in the padded one: boxes of one shape."""

    source: Box
    target: Box


@dataclass(frozen=True, slots=True)
class Layout:
    """A model over tensor * expert devices.  On one, everything is as the checkpoint has it."""

    config: ModelConfig  # the checkpoint's
    tensor: int
    expert: int
    kv_copies: int  # slots of each kv head

    @property
    def num_devices(self) -> int:
        return self.tensor * self.expert

    @property
    def num_slots(self) -> int:
        """KV heads of all devices, repeated and empty ones included."""
        return _up(self.config.num_kv_heads * self.kv_copies, self.num_devices)

    @property
    def slot_group(self) -> int:
        """Query heads of a slot."""
        return -(-self._group // self.kv_copies)

    @property
    def vocab_size(self) -> int:
        """Tokens of all devices, with those that only pad."""
        return self.config.vocab_size if self.num_devices == 1 else self._padded("vocab")

    @property
    def part(self) -> Part:
        """What a device's modules have to know."""
        if self.num_devices == 1:
            return WHOLE
        experts = self.config.experts
        return Part(self.num_devices, None if experts is None else self._padded("expert") // self.expert)

    @property
    def local(self) -> ModelConfig:
        """The model as one device sees it."""
        if self.num_devices == 1:
            return self.config
        experts = self.config.experts
        if experts is not None:
            experts = replace(experts, intermediate_size=self._padded("expert_ffn") // self.tensor)
        return replace(
            self.config,
            num_kv_heads=self.num_slots // self.num_devices,
            num_heads=self.num_slots * self.slot_group // self.num_devices,
            intermediate_size=self._padded("ffn") // self.num_devices,
            vocab_size=self.vocab_size // self.num_devices,
            experts=experts,
        )

    def padded_shape(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array over all devices for a parameter that is `shape` in the checkpoint."""
        if self.num_devices == 1:
            return shape
        return tuple(
            self._padded(axis) if axis in RULES and (RULES[axis] or axis == "group") else size
            for axis, size in zip(axes, shape, strict=True)
        )

    def moves(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[Move, ...]:
        """Where the numbers of a checkpoint's parameter go; what no target covers is zero."""
        if self.num_devices == 1 or self.padded_shape(axes, shape) == shape:
            whole = tuple(slice(0, size) for size in shape)
            return (Move(whole, whole),)
        if "kv_heads" in axes and "group" in axes:
            return tuple(self._slot_moves(axes, shape))
        pieces = [
            self._head_pieces() if axis == "heads" else [(slice(0, size), slice(0, size))]
            for axis, size in zip(axes, shape, strict=True)
        ]
        return tuple(Move(*map(tuple, zip(*choice, strict=True))) for choice in product(*pieces))

    @property
    def _group(self) -> int:
        """Query heads of a kv head."""
        return self.config.num_heads // self.config.num_kv_heads

    def _padded(self, axis: str) -> int:
        """Size of a divided dimension over all devices, and of the groups in a slot."""
        config, experts = self.config, self.config.experts
        if axis == "kv_heads":
            return self.num_slots
        if axis == "heads":
            return self.num_slots * self.slot_group
        if axis == "group":
            return self.slot_group + 2
        if axis == "ffn":
            return _up(config.intermediate_size, self.num_devices * _FFN_MULTIPLE)
        if axis == "vocab":
            return _up(config.vocab_size, self.num_devices * _VOCAB_MULTIPLE)
        assert experts is not None, axis
        if axis == "expert":
            return _up(experts.num_experts, self.expert)
        size = _up(experts.intermediate_size, self.tensor * (1 if self.tensor == 1 else _FFN_MULTIPLE))
        return size if axis == "expert_ffn" else 2 * size

    def _slot_heads(self) -> list[tuple[int, int, slice]]:
        """Of each slot in use: its number, its kv head, and which query heads of that are its own."""
        return [
            (head * self.kv_copies + copy, head, slice(start, min(start + self.slot_group, self._group)))
            for head in range(self.config.num_kv_heads)
            for copy in range(self.kv_copies)
            if (start := copy * self.slot_group) < self._group
        ]

    def _head_pieces(self) -> list[tuple[slice, slice]]:
        """Of query heads alone, as the output projection has them."""
        return [
            (
                slice(head * self._group + queries.start, head * self._group + queries.stop),
                slice(slot * self.slot_group, slot * self.slot_group + queries.stop - queries.start),
            )
            for slot, head, queries in self._slot_heads()
        ]

    def _slot_moves(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> list[Move]:
        """Of fused projections: each slot's query heads, and behind them its head's key and value."""
        found = []
        for slot, head, queries in self._slot_heads():
            for columns, first in (
                (queries, 0),
                (slice(self._group, self._group + 2), self.slot_group),
            ):
                width = columns.stop - columns.start
                places = {
                    "kv_heads": (slice(head, head + 1), slice(slot, slot + 1)),
                    "group": (columns, slice(first, first + width)),
                }
                pairs = [
                    places.get(axis, (slice(0, size), slice(0, size)))
                    for axis, size in zip(axes, shape, strict=True)
                ]
                found.append(Move(*map(tuple, zip(*pairs, strict=True))))
        return found


def plan_layout(config: ModelConfig, num_devices: int, *, expert_parallel: bool = False) -> Layout:
    """The layout in which devices have the least to do.

    With `expert_parallel` each device has its own experts, otherwise a share of every expert.

    Raises ConfigError if there are no experts to lay out.
    """
    if expert_parallel and config.experts is None:
        raise ConfigError(
            f"enable_expert_parallel: a model of family {config.family!r} has no experts; leave it out"
        )
    tensor, expert = (1, num_devices) if expert_parallel else (num_devices, 1)
    group = config.num_heads // config.num_kv_heads

    def work(copies: int) -> tuple[int, int, int]:
        """A device's projections, its pages, and then the fewest copies."""
        slots = -(-config.num_kv_heads * copies // num_devices)
        return slots * (-(-group // copies) + 1), slots, copies

    copies = 1 if num_devices == 1 else min(range(1, group + 1), key=work)
    return Layout(config, tensor, expert, copies)


def mesh_size(layout: Layout, axis: str) -> int:
    """Into how many parts a dimension called `axis` is cut."""
    sizes = {TENSOR: layout.tensor, EXPERT: layout.expert}
    return prod(sizes[mesh_axis] for mesh_axis in RULES[axis])


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
