"""Images: what a chat with one of 1024 x 1024 pixels waits for, the tower's share in it, and mixed company."""

from __future__ import annotations

import hashlib
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.h100.engine import SETTINGS
from benchmarks.h100.models import write_model
from benchmarks.h100.tables import print_table
from jaxserve.config import EngineConfig
from jaxserve.engine.protocol import CoreRequest, ImageInfo, ImageInput, TokenOutput
from jaxserve.sampling_params import SamplingParams

OUTPUT = 128  # tokens of an answer
SIDES = ((1024, 1024), (1280, 720), (512, 512), (224, 224), (640, 480))  # pixels, of images in mixed company
CHATS = 32


@dataclass
class Answer:
    """When a request's tokens came, in seconds from its submission."""

    submitted: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    error: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def tokens_per_second(self) -> float:
        """Behind the first token."""
        return sum(self.counts[1:]) / (self.times[-1] - self.times[0])


class VisionEngine:
    """An engine that is asked by core requests, as a server's front end asks it.  A context manager."""

    def __init__(self, model: str, folder: Path, overrides: dict[str, Any]) -> None:
        from jaxserve.assembly import assemble

        start = time.perf_counter()
        path = write_model(model, folder)
        self._client = assemble(EngineConfig(model=str(path), **(SETTINGS | overrides))).client
        self.load_seconds = time.perf_counter() - start
        self.info = self._client.info
        assert self.info.images is not None, f"{model} takes no images"
        self.images: ImageInfo = self.info.images
        self._rng = random.Random(0)
        self._answers: dict[str, Answer] = {}
        self._client.start(self._on_outputs, self._on_dead)

    def __enter__(self) -> VisionEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.shutdown()

    def image(self, width: int, height: int, seed: int) -> ImageInput:
        """Noise of about so many pixels, as large as the processor would make it."""
        processor = self.images.processor
        side, patch, merge = processor.token_pixels, processor.patch_size, processor.merge_size
        scale = min(1.0, (self.images.max_image_tokens * side * side / (width * height)) ** 0.5)
        columns, rows = (
            max(1, int(scale * size / side + (0.5 if scale == 1 else 0))) for size in (width, height)
        )
        patches = rows * columns * merge * merge
        pixels = (
            np.random.default_rng(seed).integers(0, 256, (patches, 3 * patch * patch), np.uint8).tobytes()
        )
        return ImageInput(
            pixels=pixels,
            grid_thw=(1, rows * merge, columns * merge),
            content_hash=hashlib.sha256(pixels).hexdigest(),
            offset=0,
            num_tokens=rows * columns,
        )

    def chat(self, images: Sequence[ImageInput], text: int, output: int = OUTPUT) -> Answer:
        """Submit a prompt of `text` random tokens with the images in the middle; returns at once."""
        token_ids = self._words(text // 2)
        placed = []
        for image in images:
            placed.append(
                ImageInput(
                    pixels=image.pixels,
                    grid_thw=image.grid_thw,
                    content_hash=image.content_hash,
                    offset=len(token_ids),
                    num_tokens=image.num_tokens,
                )
            )
            token_ids += [self.images.image_token_id] * image.num_tokens
        token_ids += self._words(text - text // 2)
        request_id = f"chat-{len(self._answers)}"
        answer = self._answers[request_id] = Answer(time.monotonic())
        self._client.submit(
            [
                CoreRequest(
                    request_id=request_id,
                    prompt_token_ids=token_ids,
                    params=SamplingParams(temperature=0.0, seed=0, max_tokens=output, ignore_eos=True),
                    eos_token_ids=(),
                    images=tuple(placed),
                    arrival_time=answer.submitted,
                )
            ]
        )
        return answer

    @property
    def compiles_after_ready(self) -> int:
        return self._client.stats().compiles_after_ready

    def _words(self, count: int) -> list[int]:
        return [self._rng.randrange(256) for _ in range(count)]

    def _on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        now = time.monotonic()
        for output in outputs:
            answer = self._answers[output.request_id]
            answer.error = output.error
            if output.token_ids:
                answer.times.append(now - answer.submitted)
                answer.counts.append(len(output.token_ids))
            if output.finish_reason is not None:
                answer.ended.set()

    def _on_dead(self, error: Exception) -> None:
        for answer in self._answers.values():
            answer.error = f"the engine died: {error}"
            answer.ended.set()


def vision(
    model: str, folder: Path, overrides: dict[str, Any], repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure both, print their tables."""
    with ExitStack() as stack:
        say(f"starting {model} …")
        engine = stack.enter_context(VisionEngine(model, folder, overrides))
        say(f"{model} is ready after {engine.load_seconds:.1f} s: {engine.info}")
        alone = _one_at_a_time(engine, repeats, say)
        mixed = _in_company(engine, say)
        compiles = engine.compiles_after_ready
        say(f"compiles after ready: {compiles}")
        return {
            "device": engine.info.device,
            "load_seconds": engine.load_seconds,
            "compiles_after_ready": compiles,
            "one_at_a_time": alone,
            "mixed": mixed,
        }


def _one_at_a_time(engine: VisionEngine, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """A new image, the same image again (which is not encoded again), and text of the same length."""
    image_tokens = engine.image(1024, 1024, 0).num_tokens
    measured: dict[str, list[Answer]] = {"new": [], "again": [], "text": []}
    for repeat in range(repeats + 1):
        image = engine.image(1024, 1024, repeat)
        for kind, images in (("new", [image]), ("again", [image]), ("text", [])):
            answer = _wait(engine.chat(images, 32 if images else 32 + image_tokens))
            if repeat:  # the first one pays for what later ones find ready
                measured[kind].append(answer)
        say(f"time to first token: {', '.join(f'{k} {a[-1].first:.4f} s' for k, a in measured.items() if a)}")
    first = {kind: statistics.median(a.first for a in answers) for kind, answers in measured.items()}
    speed = {
        kind: statistics.median(a.tokens_per_second for a in answers) for kind, answers in measured.items()
    }
    titles = {
        "new": "image of 1024 x 1024",
        "again": "the same one again",
        "text": f"text of {image_tokens + 32} tokens",
    }
    print_table(
        f"one chat at a time, {image_tokens} tokens of image, {OUTPUT} tokens of answer",
        ("prompt", "first token ms", "tok/s after it"),
        [(titles[kind], 1000 * first[kind], speed[kind]) for kind in measured],
    )
    share = (first["new"] - first["again"]) / first["new"]
    print(f"the tower's share in the time to the first token: {100 * share:.0f} %", flush=True)
    return {
        "image_tokens": image_tokens,
        "first_token_s": first,
        "tok_s": speed,
        "tower_share": share,
        "all_first_token_s": {kind: [a.first for a in answers] for kind, answers in measured.items()},
    }


def _in_company(engine: VisionEngine, say: Callable[[str], None]) -> dict[str, Any]:
    """32 chats at once, every other one with an image or two of various sizes."""
    start = time.monotonic()
    answers = []
    for index in range(CHATS):
        sides = [SIDES[index // 2 % len(SIDES)]] * (1 + index % 8 // 7) if index % 2 else []
        images = [engine.image(*side, seed=1000 + 2 * index + i) for i, side in enumerate(sides)]
        answers.append(engine.chat(images, 64 if images else 256))
    for answer in answers:
        _wait(answer)
    seconds = time.monotonic() - start
    firsts = sorted(answer.first for answer in answers)
    longest_wait = max(
        later - sooner
        for answer in answers
        for sooner, later in zip(answer.times, answer.times[1:], strict=False)
    )
    result = {
        "chats": CHATS,
        "seconds": seconds,
        "out_tok_s": CHATS * OUTPUT / seconds,
        "first_token_median_s": statistics.median(firsts),
        "first_token_last_s": firsts[-1],
        "longest_gap_s": longest_wait,
    }
    print_table(
        f"{CHATS} chats at once, half of them with images",
        ("", "out tok/s", "first token ms", "last first ms", "longest gap ms"),
        [
            (
                "",
                result["out_tok_s"],
                1000 * result["first_token_median_s"],
                1000 * firsts[-1],
                1000 * longest_wait,
            )
        ],
    )
    say(f"{CHATS} chats took {seconds:.2f} s")
    return result


def _wait(answer: Answer) -> Answer:
    answer.ended.wait()
    if answer.error is not None:
        raise RuntimeError(answer.error)
    return answer
