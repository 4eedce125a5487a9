"""The benchmark of images against a scripted server: its requests are right, and so are its sums."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.vision import measure
from jaxserve.errors import JaxserveError
from tests.server.serving import listening, say, serving
from tests.vision import TEMPLATE, TOKENS, vision_info

ARGS = {
    "side": 112,
    "repeat": 2,
    "requests": 6,
    "concurrency": 4,
    "max_tokens": 8,
    "seed": 0,
    "printable": False,
}


async def test_every_figure_is_there() -> None:
    with serving(
        say("abc"), info=vision_info(max_model_len=2048), chat_template=TEMPLATE, special_tokens=TOKENS
    ) as served:
        async with listening(served) as url:
            result = await measure(url, argparse.Namespace(**ARGS))
        with_images = [request for request in served.engine.submitted if request.images]
    alone, crowd = result["alone"], result["crowd"]
    assert result["compiles_after_ready"] == 0
    assert len(with_images) == 3 * 2 + 3
    assert len({image.content_hash for request in with_images for image in request.images}) == 3 + 3
    tokens = alone["prompt_tokens"]
    assert tokens["new image"] == tokens["same image"]
    assert abs(tokens["text"] - tokens["new image"]) < 60
    assert set(alone["time_to_first_token_ms"]) == {"new image", "same image", "text"}
    parts = alone["preparing_image_ms"] + alone["tower_ms"] + alone["time_to_first_token_ms"]["text"]
    assert parts == pytest.approx(alone["time_to_first_token_ms"]["new image"], abs=0.05)
    assert crowd["requests"] == 6
    assert crowd["output_tokens_per_second"] > 0


async def test_failed_requests_end_it() -> None:
    with serving(say("abc")) as served:  # of a text model
        async with listening(served) as url:
            with pytest.raises(JaxserveError, match="this model takes text only"):
                await measure(url, argparse.Namespace(**ARGS))
