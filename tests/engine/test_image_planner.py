"""Images through scheduler and caches on a simulated device, against each request alone."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import pytest

from jaxserve.engine.encoder_cache import PAGE_ROWS, EncoderCache
from jaxserve.engine.image_planner import ImagePlanner
from jaxserve.engine.pages import PageAllocator
from jaxserve.engine.plan import ImageSpan, PlanEntry, StepPlan, StepResult
from jaxserve.engine.protocol import CoreRequest, ImageInput
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.tower_lattice import TowerLattice, TowerShape
from jaxserve.sampling_params import SamplingParams
from tests.engine.simulated_device import VOCAB_SIZE, SimulatedDevice, generate_alone

PAGE_SIZE = 4
MAX_LEN = 128
PLACEHOLDER = 7
LATTICE = TowerLattice((TowerShape(2, 64, 0, 0), TowerShape(1, 256, 0, 0)), max_image_tokens=64)


def seen(content_hash: str, index: int) -> int:
    """What stands for a placeholder on the simulated device."""
    return 1000 + hash((content_hash, index)) % 100_000


def image(content: str, rows: int, columns: int, offset: int) -> ImageInput:
    """One of so many tokens down and across."""
    return ImageInput(
        pixels=b"",
        grid_thw=(1, 2 * rows, 2 * columns),
        content_hash=f"{content} {rows}x{columns}",
        offset=offset,
        num_tokens=rows * columns,
    )


class SeeingDevice(SimulatedDevice):
    """Puts what the encoder's cache holds in the place of placeholders."""

    def __init__(self) -> None:
        super().__init__(PAGE_SIZE)
        self.encoded: list[str] = []
        self._cache: dict[int, tuple[str, int]] = {}  # page -> image, and which of its pages

    def run(self, plan: StepPlan) -> StepResult:
        sizes = [encode.image.grid_thw[1] * encode.image.grid_thw[2] for encode in plan.encodes]
        assert not sizes or LATTICE.shape(sizes) is not None, "one call of the tower a step"
        for encode in plan.encodes:
            self.encoded.append(encode.image.content_hash)
            assert len(encode.pages) == -(-encode.image.num_tokens // PAGE_ROWS)
            for index, page in enumerate(encode.pages):
                self._cache[page] = encode.image.content_hash, index
        return super().run(replace(plan, entries=tuple(self._looked_up(entry) for entry in plan.entries)))

    def _looked_up(self, entry: PlanEntry) -> PlanEntry:
        token_ids = list(entry.token_ids)
        for span in entry.images:
            for position in range(max(span.start, entry.start), min(span.end, entry.start + len(token_ids))):
                page, row = divmod(position - span.start, PAGE_ROWS)
                content_hash, index = self._cache[span.pages[page]]
                assert index == page
                token_ids[position - entry.start] = seen(content_hash, page * PAGE_ROWS + row)
        return replace(entry, token_ids=tuple(token_ids))


def make_request(name: str, rng: random.Random, contents: Sequence[str]) -> CoreRequest:
    token_ids: list[int] = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 3, 4, 8]))]
    images = []
    for _ in range(rng.choice([0, 1, 1, 2])):
        rows, columns = rng.choice([(1, 1), (2, 3), (4, 4), (6, 7), (3, 1)])
        images.append(image(rng.choice(contents), rows, columns, len(token_ids)))
        token_ids += [PLACEHOLDER] * (rows * columns)
        token_ids += [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 1, 2, 5]))]
    return CoreRequest(
        request_id=name,
        prompt_token_ids=token_ids,
        params=SamplingParams(max_tokens=rng.randint(1, 12), seed=0),
        eos_token_ids=(),
        images=tuple(images),
        arrival_time=float(len(name)),
        priority=rng.choice([0, 0, 1, -1]),
    )


def alone(request: CoreRequest) -> list[int]:
    token_ids = list(request.prompt_token_ids)
    for one in request.images:
        for index in range(one.num_tokens):
            token_ids[one.offset + index] = seen(one.content_hash, index)
    return generate_alone(token_ids, request.params.max_tokens or 0, (), (), MAX_LEN)


@pytest.mark.parametrize("seed", range(40))
def test_any_load_gives_what_each_request_gives_alone(seed: int) -> None:
    """Whatever is evicted, preempted, found in a cache or cut into chunks."""
    rng = random.Random(seed)
    allocator = PageAllocator(rng.choice([34, 40, 80]), enable_prefix_caching=rng.random() < 0.8)
    cache = EncoderCache(rng.choice([2, 3, 8]))
    planner = ImagePlanner(cache, LATTICE)
    budget = rng.choice([6, 16, 64])
    scheduler = Scheduler(
        allocator,
        page_size=PAGE_SIZE,
        max_num_seqs=rng.randint(1, 6),
        token_budget=budget,
        scoring_budget=budget,
        max_model_len=MAX_LEN,
        images=planner,
    )
    device, in_flight = SeeingDevice(), deque[tuple[StepPlan, StepResult]]()
    got: dict[str, list[int]] = {}

    def step() -> None:
        scheduler.burst_steps = rng.choice([1, 4])
        plan = scheduler.schedule()
        if plan is not None:
            in_flight.append((plan, device.run(plan)))
        if in_flight and (plan is None or len(in_flight) >= 2):
            for output in scheduler.commit(*in_flight.popleft()):
                got.setdefault(output.request_id, []).extend(output.token_ids)

    requests, aborted = [make_request(f"r{index}", rng, "abc") for index in range(20)], set()
    for request in requests:
        scheduler.add(request)
        for _ in range(rng.randint(0, 4)):
            step()
        one = rng.choice(requests).request_id
        if rng.random() < 0.2 and scheduler.abort(one):
            aborted.add(one)
    for _ in range(2000):
        if not in_flight and not scheduler.num_running + scheduler.num_waiting:
            break
        step()
    else:
        raise AssertionError("no progress")
    for request in requests:
        if request.request_id not in aborted:
            assert got[request.request_id] == alone(request)
    cache.begin_step()
    assert cache.make_room("all of it", cache.num_pages * PAGE_ROWS) is not None, (
        "somebody still holds an image"
    )


def test_an_image_that_is_kept_is_encoded_once() -> None:
    allocator = PageAllocator(80, enable_prefix_caching=False)
    planner = ImagePlanner(EncoderCache(8), LATTICE)
    scheduler = Scheduler(
        allocator,
        page_size=PAGE_SIZE,
        max_num_seqs=2,
        token_budget=64,
        scoring_budget=64,
        max_model_len=MAX_LEN,
        images=planner,
    )
    device = SeeingDevice()
    for index in range(4):
        one = image("a", 4, 4, 2)
        scheduler.add(
            CoreRequest(
                request_id=f"r{index}",
                prompt_token_ids=[1, 2, *[PLACEHOLDER] * 16, 3],
                params=SamplingParams(max_tokens=1, seed=0),
                eos_token_ids=(),
                images=(one,),
            )
        )
        while (plan := scheduler.schedule()) is not None:
            scheduler.commit(plan, device.run(plan))
    assert device.encoded == ["a 4x4"]
    assert scheduler.image_cache_counts == (4, 3)


def test_text_goes_on_behind_the_longer_side() -> None:
    span = ImageSpan(start=10, num_rows=2, num_columns=5, rope_start=8, pages=(0,))
    assert span.end == 20
    assert span.rope_delta == (8 + 5) - 20
