"""Images through a whole engine: what transformers answers, in chunks, in company, and from every cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from jaxserve.engine.client import InProcessClient, build_client
from jaxserve.engine.plan import Encode
from jaxserve.engine.protocol import CoreRequest
from jaxserve.engine.tower import Tower
from tests.engine.tiny_engine import Collector, request, tiny_config
from tests.models.vision_cases import (
    IMAGE,
    NUM_GENERATED,
    PROCESSOR,
    TURNS,
    VISION_END,
    VISION_START,
    Turn,
    checkpoint,
    conversation,
    goldens,
    picture,
)

FAMILY = "qwen2_5_vl"


class Seeing:
    """A running engine, and the images that its tower was given.

    Its caches keep what any test asked for: a test that counts does so among images of its own.
    """

    def __init__(self, client: InProcessClient, encoded: list[str]) -> None:
        self.client = client
        self._encoded = encoded
        self._collector = Collector()
        self._count = 0
        client.start(self._collector.on_outputs, self._collector.on_dead)

    def answer(self, *turns: Turn, **params: object) -> list[list[int]]:
        requests: list[CoreRequest] = []
        for turn in turns:
            self._count += 1
            settings = {"max_tokens": NUM_GENERATED} | params
            requests.append(
                replace(request(f"r{self._count}", turn.token_ids, **settings), images=turn.images)  # type: ignore[arg-type]  # by name
            )
        self.client.submit(requests)
        ids = [one.request_id for one in requests]
        self._collector.wait(*ids)
        assert self._collector.error is None
        assert all(output.error is None for i in ids for output in self._collector.outputs[i])
        return [self._collector.tokens(i) for i in ids]

    def encoded(self, images: set[str]) -> list[str]:
        """Those of the images that the tower was given, as often as it was given them."""
        return sorted(image for image in self._encoded if image in images)


@pytest.fixture(scope="module")
def seeing(cache_dir: str) -> Iterator[Seeing]:
    """Chunks of 16 tokens and pages of 8: images are cut by both."""
    encoded: list[str] = []
    encode = Tower.encode

    def watched(tower: Tower, encodes: Sequence[Encode]) -> None:
        encoded.extend(one.image.content_hash for one in encodes)
        encode(tower, encodes)

    model = checkpoint(FAMILY)
    config = tiny_config(cache_dir, max_model_len=256, max_num_batched_tokens=16, forbid_recompile=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tower, "encode", watched)
        client = build_client(config, model, model.config, None, PROCESSOR)
        yield Seeing(client, encoded)
        client.shutdown()


def test_answers_are_transformers_own(seeing: Seeing) -> None:
    wanted = [goldens()[FAMILY][title]["token_ids"] for title in TURNS]
    assert seeing.answer(*TURNS.values()) == wanted
    images = {image.content_hash for turn in TURNS.values() for image in turn.images}
    assert seeing.encoded(images) == sorted(images), "each image once"
    # From pages of the prefix cache, and then from the encoder's cache alone.
    hits = seeing.client.stats().prefix_cache_hits
    assert seeing.answer(*TURNS.values()) == wanted
    assert seeing.client.stats().prefix_cache_hits > hits
    assert seeing.client.reset_prefix_cache()
    assert seeing.answer(*TURNS.values()) == wanted
    assert seeing.encoded(images) == sorted(images)
    assert seeing.client.stats().compiles_after_ready == 0


def test_images_of_one_size_do_not_pass_for_each_other(seeing: Seeing) -> None:
    turn = conversation((8, 16), seed=7)  # no other test's
    other = Turn(turn.token_ids, (picture((8, 16), seed=777, offset=turn.images[0].offset),))
    first, second = seeing.answer(turn, logprobs=1), seeing.answer(other, logprobs=1)
    assert seeing.client.reset_prefix_cache()
    assert seeing.answer(other) == second
    assert first != second, "the case tells nothing if both are answered alike"


def test_what_an_engine_says_of_images(seeing: Seeing) -> None:
    images = seeing.client.info.images
    assert images is not None
    assert images.marker_token_ids == (VISION_START, IMAGE, VISION_END)
    assert images.image_token_id == IMAGE
    assert images.max_image_tokens == 64
    assert images.processor == PROCESSOR


def test_a_text_engine_refuses_images(engine: tuple[InProcessClient, Collector]) -> None:
    client, collector = engine
    turn = TURNS["one token"]
    refused = replace(request("seeing", [1] * len(turn.token_ids)), images=turn.images)
    client.submit([refused])
    collector.wait("seeing")
    assert "text only" in (collector.outputs["seeing"][-1].error or "")
    assert client.info.images is None
