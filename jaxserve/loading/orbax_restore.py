"""Reads the parameters of a converted checkpoint into the shards of device arrays."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxserve.loading.boxes import (
    Piece,
    ShardPlan,
    box_bytes,
    box_shape,
    moved,
    overlap,
    plan_shards,
    relative,
)
from jaxserve.loading.byte_budget import ByteBudget
from jaxserve.loading.orbax_format import ChunkIndex, ParameterLayout
from jaxserve.models.layout import Box, Move
from jaxserve.progress import progress_bar

if TYPE_CHECKING:
    from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint

_MAX_THREADS = 16
_LEAST_BUDGET = 64 << 20
_ALIGNMENT = 64  # of host memory that JAX on CPU takes over as it is instead of copying it


def restore(
    checkpoint: OrbaxCheckpoint,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    moves: Mapping[str, Sequence[Move]],
    *,
    progress: bool,
) -> dict[str, jax.Array]:
    """The parameters of `wanted`, whose names are the checkpoint's, in its shapes, dtypes and shardings.

    `moves` say of parameters whose shapes are not the checkpoint's which of its numbers go where.
    A chunk that several shards need is read once, one that no device of this process needs is not read.  Beside the
    arrays themselves host memory holds at most two of the largest.  Raises CheckpointError for damaged files.
    """
    return _Restoring(checkpoint, wanted, moves, progress=progress).run()


def num_threads() -> int:
    """Of those that read: a few even on small machines, since they wait for the disk and for the device."""
    return max(4, min(_MAX_THREADS, os.cpu_count() or 1))


def chunks_within(layout: ParameterLayout, boxes: list[Box]) -> list[ChunkIndex]:
    """The chunks that have a part in any of the boxes."""
    return [index for index in layout.chunks() if any(overlap(layout.box(index), box) for box in boxes)]


@dataclass
class _Shard:
    """A part of a parameter on the host."""

    plan: ShardPlan
    array: np.ndarray = field(init=False)


class _Parameter:
    """A parameter on its way to the devices."""

    def __init__(
        self,
        name: str,
        layout: ParameterLayout,
        wanted: jax.ShapeDtypeStruct,
        moves: Sequence[Move] | None,
    ) -> None:
        self.name = name
        self.layout = layout
        self.wanted = wanted
        self.shards = [_Shard(plan) for plan in plan_shards(wanted, moves)]
        sources = [piece.source for shard in self.shards for piece in shard.plan.pieces]
        self.chunks = chunks_within(layout, sources)
        self.num_bytes = sum(box_bytes(shard.plan.box, wanted.dtype) for shard in self.shards)
        self.num_unread = len(self.chunks)

    def overlaps(self, box: Box) -> list[tuple[_Shard, Piece, Box]]:
        """Where the numbers of a box of the checkpoint's parameter are wanted, and which of them."""
        return [
            (shard, piece, common)
            for shard in self.shards
            for piece in shard.plan.pieces
            if (common := overlap(box, piece.source)) is not None
        ]


class _Restoring:
    def __init__(
        self,
        checkpoint: OrbaxCheckpoint,
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        moves: Mapping[str, Sequence[Move]],
        *,
        progress: bool,
    ) -> None:
        self._checkpoint = checkpoint
        parameters = [
            _Parameter(name, checkpoint.layouts[name], spec, moves.get(name)) for name, spec in wanted.items()
        ]
        # The largest first, so that few are left at the end; parameters alike follow each other, for _Buffers.
        self._parameters = sorted(parameters, key=lambda parameter: -parameter.num_bytes)
        largest = max((parameter.num_bytes for parameter in parameters), default=0)
        self._budget = ByteBudget(max(2 * largest, _LEAST_BUDGET))
        self._buffers = _Buffers()
        self._lock = threading.Lock()
        self._arrays: dict[str, jax.Array] = {}
        total = sum(len(p.chunks) * p.layout.chunk_bytes for p in parameters)
        self._bar = progress_bar(total, "Loading weights", "B", enabled=progress)

    def run(self) -> dict[str, jax.Array]:
        with self._bar, ThreadPoolExecutor(num_threads(), "weights") as pool:
            try:
                futures: list[Future[None]] = [pool.submit(self._check_metadata)]
                for parameter in self._parameters:
                    if not self._budget.take(parameter.num_bytes):
                        break  # a thread failed
                    for shard in parameter.shards:
                        shard.array = self._buffers.take(shard.plan.box, parameter.wanted.dtype)
                        if not shard.plan.is_covered:
                            shard.array[...] = 0
                    futures += [pool.submit(self._read, parameter, index) for index in parameter.chunks]
                    if not parameter.chunks:  # nothing but padding is wanted here
                        futures.append(pool.submit(self._finish, parameter))
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._arrays

    def _check_metadata(self) -> None:
        try:
            self._checkpoint.check_metadata()
        except BaseException:
            self._budget.stop()
            raise

    def _read(self, parameter: _Parameter, index: ChunkIndex) -> None:
        """Read one chunk, and hand the parameter to the devices if it was the last."""
        try:
            self._read_chunk(parameter, index)
            with self._lock:
                parameter.num_unread -= 1
                is_last = not parameter.num_unread
                self._bar.update(parameter.layout.chunk_bytes)
        except BaseException:
            self._budget.stop()
            raise
        if is_last:
            self._finish(parameter)

    def _read_chunk(self, parameter: _Parameter, index: ChunkIndex) -> None:
        chunk = parameter.layout.box(index)
        shared = parameter.overlaps(chunk)
        if len(shared) == 1 and shared[0][2] == chunk:
            shard, piece, _ = shared[0]
            out = shard.array[moved(chunk, piece.source, piece.target)]
            self._checkpoint.read_chunk(parameter.name, index, out)
            return
        for start, block in self._checkpoint.read_blocks(parameter.name, index):
            first = chunk[0].start + start
            rows = (slice(first, first + len(block)), *chunk[1:])
            for shard, piece, _ in shared:
                common = overlap(rows, piece.source)
                if common is not None:
                    shard.array[moved(common, piece.source, piece.target)] = block[relative(common, rows)]

    def _finish(self, parameter: _Parameter) -> None:
        """Hand a parameter to the devices, and its memory on."""
        try:
            array = self._place(parameter)
        except BaseException:
            self._budget.stop()
            raise
        with self._lock:
            self._arrays[parameter.name] = array
        self._budget.give(parameter.num_bytes)

    def _place(self, parameter: _Parameter) -> jax.Array:
        arrays = [
            jax.device_put(shard.array, target) for shard in parameter.shards for target in shard.plan.targets
        ]
        jax.block_until_ready(arrays)
        for shard in parameter.shards:
            self._buffers.give(shard.array)
        if parameter.wanted.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(
            parameter.wanted.shape, parameter.wanted.sharding, arrays
        )


class _Buffers:
    """Host memory of shards.  For devices with memory of their own it is used again, since new memory is slow.

    On CPU it becomes the array.
    """

    def __init__(self) -> None:
        self._is_reused = jax.default_backend() != "cpu"
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, box: Box, dtype: np.dtype) -> np.ndarray:
        num_bytes = box_bytes(box, dtype)
        with self._lock:
            free = self._free.pop(num_bytes, [])
            # Parameters come by size: what has another one will not be asked for again.
            self._free = {num_bytes: free}
            memory = free.pop() if free else None
        if memory is None:
            memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
            offset = -memory.ctypes.data % _ALIGNMENT
            memory = memory[offset : offset + num_bytes]
        return memory.view(dtype).reshape(box_shape(box))

    def give(self, array: np.ndarray) -> None:
        if self._is_reused:
            memory = array.reshape(-1).view(np.uint8)
            with self._lock:
                if memory.size in self._free:
                    self._free[memory.size].append(memory)
