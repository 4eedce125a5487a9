"""A step plan as arrays: packed into one integer vector on the host, taken apart inside jit.

One vector means one transfer a step.  Its layout is a function of the forward shape alone.  The page table stays on
the device, and a step brings what is new in it: whole rows would be megabytes a step with a long context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxserve.engine import packed_vector
from jaxserve.engine.image_batch import TEXT, token_places
from jaxserve.engine.lattice import ForwardShape
from jaxserve.engine.plan import ON_DEVICE, StepPlan
from jaxserve.kernels_pallas.metadata import AttentionMetadata, Backend


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Inputs of a forward pass, inside jit."""

    token_ids: jax.Array  # [T] int32; ON_DEVICE where the token sampled last in `slots` is meant
    slots: jax.Array  # [T] int32, row of the sampler state
    sample_index: jax.Array  # [R] int32, token whose hidden state row r samples from (mixed steps)
    page_table: jax.Array  # [slots + 1, MP] int32, the pages of every slot, this step's new ones included
    meta: AttentionMetadata
    # Of models that see: rope positions [3, T] and image rows [T], int32; see ImageTokens.
    images: tuple[jax.Array, jax.Array] | None = None


def _layout(shape: ForwardShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of each part of the vector, in order."""
    tokens, rows = shape.num_tokens, shape.num_rows
    parts: dict[str, tuple[int, ...]] = {
        "token_ids": (tokens,),
        "slots": (tokens,),
        "positions": (tokens,),
        "kv_lens": (rows,),
        "new_pages": (3, shape.num_new_pages),  # slot, place in its row of the page table, page
    }
    if shape.kind == "decode":
        parts["num_steps"] = (rows,)  # of a burst, in which the row takes part
    if shape.has_images:
        parts |= {"rope_positions": (3, tokens), "image_rows": (tokens,)}
    if shape.kind == "mixed":
        parts |= {
            "row_slots": (rows,),
            "token_rows": (tokens,),
            "sample_index": (rows - 1,),
            "query_starts": (rows + 1,),
            "tile_rows": (shape.num_tiles,),
            "tile_starts": (shape.num_tiles,),
            "num_tiles": (),
        }
    return parts


def vector_length(shape: ForwardShape) -> int:
    """Length of the packed vector."""
    return packed_vector.length(_layout(shape))


def new_pages(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Slot, place in its row of the page table, and page, of each page that a sequence gets in this step."""
    return [
        (entry.slot, entry.page_offset + i, page)
        for entry in plan.entries
        if entry.new_pages
        for i, page in enumerate(entry.new_pages)
    ]


def pack(
    plan: StepPlan, shape: ForwardShape, pages: Sequence[tuple[int, int, int]], dummy_slot: int
) -> np.ndarray:
    """The plan as one int32 vector.  `pages` are at most shape.num_new_pages of its new ones."""
    vector = np.zeros(vector_length(shape), np.int32)
    part = packed_vector.views(vector, _layout(shape))
    part["slots"][:] = dummy_slot
    part["new_pages"][0] = dummy_slot
    if pages:
        part["new_pages"][:, : len(pages)] = np.array(pages, np.int32).T
    entries = plan.entries
    if shape.has_images:
        _place_images(plan, part, shape)
    slots = [entry.slot for entry in entries]
    ends = [entry.start + len(entry.token_ids) for entry in entries]
    part["kv_lens"][: len(entries)] = ends
    if shape.kind == "decode":
        part["slots"][: len(entries)] = slots
        part["token_ids"][: len(entries)] = [entry.token_ids[-1] for entry in entries]
        part["positions"][: len(entries)] = [end - 1 for end in ends]
        part["num_steps"][: len(entries)] = [entry.num_steps for entry in entries]
        # The other tokens of short chunks (Lattice.chunk_rows): keys and values of all rows are written before any row
        # looks at them, and so each token finds those before it.
        row = len(entries)
        for entry in entries:
            for offset, token_id in enumerate(entry.token_ids[:-1]):
                position = entry.start + offset
                part["slots"][row], part["token_ids"][row] = entry.slot, token_id
                part["positions"][row], part["kv_lens"][row] = position, position + 1
                part["num_steps"][row] = 1
                row += 1
        return vector
    part["row_slots"][:] = dummy_slot
    part["row_slots"][: len(entries)] = slots
    part["token_rows"][:] = shape.num_rows - 1
    token = tile = 0
    for row, entry in enumerate(entries):
        count = len(entry.token_ids)
        chunk = slice(token, token + count)
        part["token_ids"][chunk] = entry.token_ids
        part["slots"][chunk] = entry.slot
        part["positions"][chunk] = np.arange(entry.start, entry.start + count)
        part["token_rows"][chunk] = row
        part["query_starts"][row] = token
        part["sample_index"][row] = token + count - 1
        starts = range(token, token + count, shape.tile_size)
        part["tile_rows"][tile : tile + len(starts)] = row
        part["tile_starts"][tile : tile + len(starts)] = starts
        token += count
        tile += len(starts)
    part["query_starts"][len(entries) :] = token
    part["num_tiles"][...] = tile
    return vector


def unpack(
    vector: jax.Array, step: jax.Array, shape: ForwardShape, page_table: jax.Array, backend: Backend = "xla"
) -> ForwardBatch:
    """Inside jit: the vector's parts, as slices that cost nothing, and `page_table` [slots + 1, MP] brought up to date.

    `step` [] int32 counts the steps of a burst; only decode steps have others than 0.  The table's last row belongs
    to the dummy slot: it stays zero.
    """
    part = packed_vector.views(vector, _layout(shape))
    slots, places, pages = part["new_pages"]
    dummy_slot = page_table.shape[0] - 1
    page_table = page_table.at[slots, places].set(pages)
    if shape.kind == "decode":
        part |= _at_step(part, step, dummy_slot)
    rows = jax.numpy.arange(shape.num_rows, dtype=jax.numpy.int32)
    empty = jax.numpy.zeros((0,), jax.numpy.int32)
    decode = shape.kind == "decode"
    meta = AttentionMetadata(
        positions=part["positions"],
        token_rows=rows if decode else part["token_rows"],
        page_table=page_table[part["slots"] if decode else part["row_slots"]],
        kv_lens=part["kv_lens"],
        query_starts=jax.numpy.arange(shape.num_rows + 1, dtype=jax.numpy.int32)
        if decode
        else part["query_starts"],
        tile_rows=empty if decode else part["tile_rows"],
        tile_starts=empty if decode else part["tile_starts"],
        num_tiles=jax.numpy.int32(0) if decode else part["num_tiles"],
        kind=shape.kind,
        tile_size=shape.tile_size,
        backend=backend,
    )
    return ForwardBatch(
        token_ids=part["token_ids"],
        slots=part["slots"],
        sample_index=rows if decode else part["sample_index"],
        page_table=page_table,
        meta=meta,
        images=(part["rope_positions"], part["image_rows"]) if shape.has_images else None,
    )


def _place_images(plan: StepPlan, part: dict, shape: ForwardShape) -> None:
    """Rotary positions and image rows, in the order in which `pack` puts the tokens."""
    positions, image_rows = part["rope_positions"], part["image_rows"]
    image_rows[:] = TEXT
    token, behind = 0, len(plan.entries)
    for row, entry in enumerate(plan.entries):
        count = len(entry.token_ids)
        if count == 1 and not entry.images:
            where = token if shape.kind == "mixed" else row
            positions[:, where] = entry.start + entry.rope_delta
        else:
            where = np.arange(token, token + count)
            if shape.kind == "decode":  # the last token first, the others behind all entries
                where = np.append(np.arange(behind, behind + count - 1), row)
                behind += count - 1
            positions[:, where], image_rows[where] = token_places(entry)
        token += count


def _at_step(part: dict[str, jax.Array], step: jax.Array, dummy_slot: int) -> dict[str, jax.Array]:
    """The parts of a decode step that the steps of a burst do not share; a row that is through becomes padding."""
    takes_part = step < part["num_steps"]
    images = {}
    if "image_rows" in part:  # what was sampled is text
        images = {
            "rope_positions": jax.numpy.where(takes_part, part["rope_positions"] + step, 0),
            "image_rows": jax.numpy.where(step > 0, TEXT, part["image_rows"]),
        }
    return images | {
        "token_ids": jax.numpy.where(step > 0, ON_DEVICE, part["token_ids"]),
        "slots": jax.numpy.where(takes_part, part["slots"], dummy_slot),
        "positions": jax.numpy.where(takes_part, part["positions"] + step, 0),
        "kv_lens": jax.numpy.where(takes_part, part["kv_lens"] + step, 0),
    }
