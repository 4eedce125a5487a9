"""Packing a plan and taking it apart again."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxserve.engine.batch import ForwardBatch, new_pages, pack, unpack, vector_length
from jaxserve.engine.encoder_cache import PAGE_ROWS
from jaxserve.engine.image_batch import TEXT
from jaxserve.engine.lattice import ForwardShape, build_lattice
from jaxserve.engine.plan import ON_DEVICE, ImageSpan, PlanEntry, StepPlan
from jaxserve.engine.sampling_rows import VARIANTS, covers

DUMMY = 4


def entry(slot: int, start: int, token_ids: tuple[int, ...]) -> PlanEntry:
    return PlanEntry(
        seq_id=slot,
        slot=slot,
        start=start,
        token_ids=token_ids,
        samples=True,
        num_generated=0,
        page_offset=0,
        new_pages=(),
    )


def round_trip(entries: list[PlanEntry], shape: ForwardShape, step: int = 0) -> ForwardBatch:
    entries = [replace(entry, new_pages=(100 + entry.slot,), page_offset=1) for entry in entries]
    table = np.arange((DUMMY + 1) * shape.max_pages, dtype=np.int32).reshape(DUMMY + 1, shape.max_pages) + 1
    table[DUMMY] = 0
    plan = StepPlan(admissions=(), entries=tuple(entries))
    vector = pack(plan, shape, new_pages(plan), DUMMY)
    assert vector.shape == (vector_length(shape),)
    return unpack(jax.numpy.asarray(vector), jax.numpy.int32(step), shape, jax.numpy.asarray(table))


def test_decode() -> None:
    shape = ForwardShape("decode", 4, 4, 1, 3)
    batch = round_trip([entry(2, 5, (ON_DEVICE,)), entry(0, 9, (7,))], shape)
    assert batch.token_ids.tolist() == [ON_DEVICE, 7, 0, 0]
    assert batch.slots.tolist() == [2, 0, DUMMY, DUMMY]
    assert batch.meta.positions.tolist() == [5, 9, 0, 0]
    assert batch.meta.kv_lens.tolist() == [6, 10, 0, 0]
    assert batch.meta.token_rows.tolist() == [0, 1, 2, 3]
    assert batch.meta.page_table.tolist() == [[7, 102, 9], [1, 100, 3], [0, 0, 0], [0, 0, 0]]
    assert batch.page_table.tolist() == [[1, 100, 3], [4, 5, 6], [7, 102, 9], [10, 11, 12], [0, 0, 0]]


def test_a_later_step_of_a_burst() -> None:
    shape = ForwardShape("decode", 4, 4, 1, 3)
    entries = [replace(entry(2, 5, (8,)), num_steps=3), replace(entry(0, 9, (7,)), num_steps=2)]
    batch = round_trip(entries, shape, step=2)
    assert batch.token_ids.tolist() == [ON_DEVICE] * 4
    assert batch.slots.tolist() == [2, DUMMY, DUMMY, DUMMY]
    assert batch.meta.positions.tolist() == [7, 0, 0, 0]
    assert batch.meta.kv_lens.tolist() == [8, 0, 0, 0]
    assert batch.meta.page_table.tolist() == [[7, 102, 9], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_a_decode_step_with_a_short_chunk() -> None:
    """The last token of each entry comes first, where the sampler looks for it."""
    shape = ForwardShape("decode", 8, 8, 1, 3)
    batch = round_trip(
        [entry(2, 5, (ON_DEVICE,)), entry(0, 9, (7, 8, 6)), entry(1, 0, (3, ON_DEVICE))], shape
    )
    assert batch.token_ids.tolist() == [ON_DEVICE, 6, ON_DEVICE, 7, 8, 3, 0, 0]
    assert batch.slots.tolist() == [2, 0, 1, 0, 0, 1, DUMMY, DUMMY]
    assert batch.meta.positions.tolist() == [5, 11, 1, 9, 10, 0, 0, 0]
    assert batch.meta.kv_lens.tolist() == [6, 12, 2, 10, 11, 1, 0, 0]
    assert batch.meta.page_table[:6].tolist() == batch.page_table[batch.slots[:6]].tolist()


def test_images_are_placed_where_their_tokens_are() -> None:
    """A decode step has the last token of each entry first; a mixed one has them in order."""
    span = ImageSpan(start=8, num_rows=1, num_columns=2, rope_start=8, pages=(3,))
    seen = replace(entry(0, 7, (6, 7, 7, 5)), images=(span,))
    entries = [
        replace(entry(2, 5, (ON_DEVICE,)), rope_delta=-2),
        seen,
        replace(entry(1, 9, (4, 3)), rope_delta=20),
    ]
    first = 3 * PAGE_ROWS  # row of the image's first token
    for shape, order in (
        (ForwardShape("decode", 8, 8, 1, 3, has_images=True), (0, 4, 6, 1, 2, 3, 5)),
        (ForwardShape("mixed", 8, 8, 1, 3, has_images=True), range(7)),
    ):
        images = round_trip(entries, shape).images
        assert images is not None
        positions, rows = (np.asarray(array)[..., :7] for array in images)
        assert rows.tolist() == [[TEXT, TEXT, first, first + 1, TEXT, TEXT, TEXT][token] for token in order]
        assert positions.T.tolist() == [
            [[3] * 3, [7] * 3, [8, 8, 8], [8, 8, 9], [10] * 3, [29] * 3, [30] * 3][token] for token in order
        ]


def test_mixed() -> None:
    shape = ForwardShape("mixed", 8, 5, 2, 3)
    batch = round_trip([entry(1, 5, (ON_DEVICE,)), entry(3, 2, (7, 8, 9)), entry(0, 0, (4, 5))], shape)
    meta = batch.meta
    assert batch.token_ids.tolist() == [ON_DEVICE, 7, 8, 9, 4, 5, 0, 0]
    assert batch.slots.tolist() == [1, 3, 3, 3, 0, 0, DUMMY, DUMMY]
    assert meta.positions.tolist() == [5, 2, 3, 4, 0, 1, 0, 0]
    assert meta.token_rows.tolist() == [0, 1, 1, 1, 2, 2, 4, 4]
    assert meta.kv_lens.tolist() == [6, 5, 2, 0, 0]
    assert meta.query_starts.tolist() == [0, 1, 4, 6, 6, 6]
    assert batch.sample_index.tolist()[:3] == [0, 3, 5]
    assert int(meta.num_tiles) == 4
    assert meta.tile_rows.tolist()[:4] == [0, 1, 1, 2]
    assert meta.tile_starts.tolist()[:4] == [0, 1, 3, 4]
    assert meta.page_table.tolist() == [[4, 101, 6], [10, 103, 12], [1, 100, 3], [0, 0, 0], [0, 0, 0]]


def test_new_pages_are_counted_from_where_a_row_ends() -> None:
    entries = (replace(entry(2, 5, (1,)), new_pages=(8, 9), page_offset=3), entry(0, 9, (7,)))
    assert new_pages(StepPlan(admissions=(), entries=entries)) == [(2, 3, 8), (2, 4, 9)]


@pytest.mark.parametrize(("platform", "hidden_size"), [("cpu", 512), ("gpu", 2048), ("gpu", 4096)])
@pytest.mark.parametrize(("seqs", "tokens"), [(1, 1), (4, 16), (32, 256), (256, 8192), (100, 300)])
def test_every_step_finds_a_shape(platform: str, hidden_size: int, seqs: int, tokens: int) -> None:
    lattice = build_lattice(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=100,
        page_size=16,
        platform=platform,
        hidden_size=hidden_size,
    )
    for count in range(1, seqs + 1):
        shape = lattice.forward("decode", count)
        assert shape.num_tokens >= count
        for variant in VARIANTS:
            for with_logprobs in (False, True):
                sampler = lattice.sample(count, variant, with_logprobs)
                assert sampler.num_rows >= count
                assert covers(sampler.variant, variant)
                assert sampler.with_logprobs >= with_logprobs
                given = {shape.num_tokens, seqs}
                assert all(g == sampler.num_rows or (g, sampler.num_rows) in lattice.resizes() for g in given)
    for count in range(1, lattice.chunk_rows + 1):  # tokens of a decode step, some of one sequence
        given = lattice.forward("decode", count).num_tokens
        rows = {
            lattice.sample(entries, v, False).num_rows for entries in range(1, count + 1) for v in VARIANTS
        }
        assert all(given == taken or (given, taken) in lattice.resizes() for taken in rows)
    for count in range(1, tokens + 1):
        shape = lattice.forward("mixed", count)
        assert shape.num_tokens >= count
        assert shape.num_rows == seqs + 1
        # The worst case: every sequence ends in a tile of one token.
        assert shape.num_tiles >= min(seqs, count) + (count - min(seqs, count)) // shape.tile_size
    assert lattice.scoring.num_tokens >= seqs  # every sequence's next token, one of them a scored prompt's
    assert lattice.scoring.num_tokens <= tokens
    assert lattice.prompt_chunk <= lattice.scoring.num_tokens
    assert all(given != taken for given, taken in lattice.resizes())
    names = [shape.name for shape in (*lattice.forwards, *lattice.samples)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("platform", "tokens", "entries", "steps", "name"),
    [
        ("cpu", 5, 5, 1, "forward_decode_8"),
        ("cpu", 8, 3, 1, "forward_decode_8"),  # short chunks in rows of their own
        ("cpu", 9, 3, 1, "forward_mixed_16"),
        ("cpu", 12, 12, 1, "forward_mixed_16"),  # four fewer rows of padding than the next decode step has
        ("cpu", 12, 12, 4, "forward_decode_32"),  # only decode steps are made for bursts
        ("cpu", 17, 17, 1, "forward_decode_32"),
        ("cpu", 40, 12, 1, "forward_mixed_64"),
        ("gpu", 8, 3, 1, "forward_mixed_64"),
        ("gpu", 20, 20, 1, "forward_decode_32"),
    ],
)
def test_the_program_of_a_step(platform: str, tokens: int, entries: int, steps: int, name: str) -> None:
    lattice = build_lattice(
        max_num_seqs=32,
        max_num_batched_tokens=256,
        max_model_len=100,
        page_size=16,
        platform=platform,
        hidden_size=4096,
    )
    assert lattice.step(tokens, entries, steps).name == name


def test_no_resize_that_no_step_needs() -> None:
    lattice = build_lattice(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=100,
        page_size=16,
        platform="gpu",
        hidden_size=4096,
    )
    # A decode step hands its rows on as they are, or padded for a sampler of coarser buckets.
    assert (128, 256) in lattice.resizes()
    assert (256, 1) in lattice.resizes()  # a mixed step with one row that samples
    assert all(given < taken for given, taken in lattice.resizes() if given != 256)
    assert (1, 256) not in lattice.resizes()
