"""Images that are refused at once, by name, and the limits of those that are not."""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jaxserve.media.loader import _processed
from jaxserve.media.policy import MediaPolicy
from tests.hourglass import Hourglass
from tests.media.photos import CAT, file_of
from tests.media.test_image_file import png_head
from tests.media.web import answer, is_allowed, web
from tests.patience import PATIENCE
from tests.server.seeing import BLUE, RED, prompt_of, refused, refused_next, seeing
from tests.server.serving import Answer, serving
from tests.vision import PAD, part, picture, text, user


@pytest.mark.parametrize("words", ["<|image_pad|>", "see <|vision_start|><|image_pad|><|vision_end|>"])
async def test_placeholders_that_a_user_types(words: str) -> None:
    with seeing() as served:
        said = await refused(served, text(words), part(RED))
        assert said.startswith("messages: messages[0].content[0] must not contain <|image_pad|>")
        answered = await served.chat(messages=[{"role": "user", "content": words}])
        assert answered.error["message"].startswith("messages[0].content must not contain <|image_pad|>")
        for prompt in (words, [65, PAD]):
            answered = await served.complete(prompt=prompt)
            assert answered.error["param"] == "prompt"
            assert "has 1 times <|image_pad|>" in answered.error["message"]
        tool = {"type": "function", "function": {"name": "f", "description": words}}
        answered = await served.chat(messages=[user(part(RED))], tools=[tool], tool_choice="none")
        assert answered.status == 200  # the template shows no tools
        assert "has 0 times" not in prompt_of(served.engine.submitted[0])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"type": "image_url"}, "image_url must be a URL or an object with one"),
        ({"type": "image_url", "image_url": {}}, "image_url must be a URL"),
        ({"type": "image_url", "image_url": 3}, "image_url must be a URL"),
        ({"type": "image_url", "image_url": None, "uuid": "u"}, "a uuid alone does not say which image"),
        (
            {"type": "image_pil", "image_pil": "x"},
            "image_pil must be a PIL image, which Python alone can send",
        ),
        ({"type": "video_url", "video_url": {"url": "x"}}, "is of type 'video_url', which is not supported"),
        ({"type": "input_audio", "input_audio": {}}, "'input_audio', which is not supported"),
        ({"type": "image_embeds", "image_embeds": "x"}, "'image_embeds', which is not supported"),
        ({"type": "hologram"}, "'hologram', which is not known"),
        ({"type": "image_url", "image_url": "data:image/png;base64,*"}, "is not valid base64"),
        (part(b"hello"), "is not an image (JPEG, PNG,"),
        (part(png_head(20_000, 20_000)), "pixels"),
        (part(CAT.read_bytes()[:5000]), "is a damaged image"),
        (part(picture(1, 1).resize((300, 1))), "one side may be at most 200 times the other"),
        (
            {"image_url": "http://example.com/a.png"},
            "The operator may allow hosts with --allowed-media-domains",
        ),
        ({"image_url": "file:///etc/passwd"}, "may allow a directory with --allowed-local-media-path"),
        ({"image_url": "a.png"}, "must be a data:, https:, http: or file: URL"),
    ],
)
async def test_bad_images(bad: dict[str, Any], says: str) -> None:
    with seeing() as served:
        said = await refused(served, text("Look:"), bad)
        assert said.startswith("messages: messages[0].content[1]")
        assert says in said


async def test_images_from_the_web_and_from_files() -> None:
    pages = {
        "/cat.png": answer(CAT.read_bytes()),
        "/inside": answer(status="302 Found", Location="http://127.0.0.2:{port}/cat.png"),
        "/slow": None,
    }
    hourglass = Hourglass()
    media = MediaPolicy(
        allowed_domains=("*",),
        allowed_directory=CAT.parent.resolve(),
        fetch_seconds=500,
        is_allowed_address=is_allowed,
    )
    with seeing(media=media) as served:
        async with web(pages) as here:
            good = [here.url("/cat.png"), f"file://{CAT}"]
            assert (await served.chat(messages=[user(*({"image_url": url} for url in good))])).status == 200
            first, second = served.engine.submitted[0].images
            assert first.content_hash == second.content_hash
            assert (await served.chat(messages=[user(*[{"image_url": good[0]}] * 3)])).status == 200
            assert here.asked == ["/cat.png"] * 2  # once by each request
            assert len(served.engine.submitted[1].images) == 3
            assert "not a public one" in await refused_next(served, {"image_url": here.url("/inside")})
            slow = asyncio.ensure_future(refused_next(served, {"image_url": here.url("/slow")}))
            while "/slow" not in here.asked:  # noqa: ASYNC110  # a list sets no event
                await asyncio.sleep(0)
            assert "did not arrive within 500 seconds" in await hourglass.outlast(slow, 100)


async def test_a_full_server_fetches_nothing() -> None:
    media = MediaPolicy(allowed_domains=("*",), is_allowed_address=is_allowed)
    with seeing({"max_num_seqs": 1}, media=media, max_num_queued_reqs=1, engine={"stalled": True}) as served:
        waiting = [asyncio.create_task(served.chat()) for _ in range(2)]
        await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 2)
        async with web({}) as here:
            answered = await served.chat(messages=[user({"image_url": here.url("/cat.png")})])
            assert (answered.status, here.asked) == (429, [])
        served.engine.resume()
        assert [(await task).status for task in waiting] == [200, 200]


async def test_decoded_images_of_waiting_requests_have_a_limit() -> None:
    in_red, in_file = 6 * 28 * 28 * 3, len(file_of(RED))
    one, two = user(part(RED)), user(part(RED), part(RED), part(BLUE))  # of what comes twice one is held
    media = MediaPolicy(max_queued_bytes=2 * in_red + in_file)
    with seeing({"max_num_seqs": 4}, media=media, engine={"stalled": True}) as served:

        async def waits(*messages: Any, **fields: Any) -> asyncio.Task[Answer]:
            before = served.engine.num_unfinished
            task = asyncio.create_task(served.chat(messages=messages, **fields))
            await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished > before)
            return task

        first = await waits(one)
        damaged = await served.chat(messages=[user(part(file_of(RED)[:-30]))])
        assert "is a damaged image" in damaged.error["message"]
        shown = await served.post("/tokenize", {"messages": [one]})
        assert shown.status == 200  # and is held no longer
        answered = await served.chat(messages=[two])
        assert (answered.status, answered.error["type"]) == (429, "RateLimitError")
        assert (
            f"max_queued_image_bytes is {2 * in_red + in_file}; try again later" in answered.error["message"]
        )
        assert answered.headers["retry-after"] == "1"
        second = await waits(one, n=2)
        assert (await served.chat(messages=[one])).status == 429
        assert (await waits({"role": "user", "content": "no image"})).done() is False
        served.engine.step(1)  # all have a first token: nobody waits
        await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_steps == 1)
        third = await waits(two)
        assert served.llm.abort(served.engine.submitted[-1].request_id.partition("#")[0])
        assert (await third).status == 503
        fourth = await waits(two)
        served.engine.resume()
        assert [(await task).status for task in (first, second, fourth)] == [200] * 3
        assert (await served.chat(messages=[two])).status == 200


async def test_images_of_one_request_may_pass_that_limit() -> None:
    with seeing(media=MediaPolicy(max_queued_bytes=1)) as served:
        assert [(await served.chat(messages=[user(part(RED))])).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "(("}},
        {"chat_template": "{{ messages[0].content }} {{ raise_exception('no') }}"},
        {"chat_template": "no image"},
        {"logit_bias": {"99999": 1}},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_of_a_refused_request_nothing_is_held(fields: dict[str, Any]) -> None:
    one = user(part(RED))
    gc.disable()  # who waits for it refuses others meanwhile
    try:
        with seeing(media=MediaPolicy(max_queued_bytes=1)) as served:
            assert (await served.chat(messages=[one], **fields)).status == 400
            assert (await served.chat(messages=[one])).status == 200
    finally:
        gc.enable()


@dataclass
class Preparing:
    """A stop in the preparing of images."""

    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def preparing(monkeypatch: pytest.MonkeyPatch) -> Preparing:
    stop = Preparing()

    def prepared(*arguments: Any) -> Any:
        stop.begun.set()
        assert stop.go_on.wait(PATIENCE)
        return _processed(*arguments)

    monkeypatch.setattr("jaxserve.media.loader._processed", prepared)
    return stop


async def test_who_brings_no_image_waits_for_none(preparing: Preparing) -> None:
    with seeing() as served:
        pictures = [part(picture(1, 1, colour)) for colour in ("red", "green", "blue", "white", "black")]
        busy = asyncio.create_task(served.chat(messages=[user(*pictures)]))
        await asyncio.to_thread(preparing.begun.wait)
        assert (await served.chat()).status == 200
        preparing.go_on.set()
        assert (await busy).status == 200


async def test_files_count_until_there_are_pixels(preparing: Preparing) -> None:
    large = user(part(file_of(RED) + bytes(50_000)))
    with seeing(media=MediaPolicy(max_queued_bytes=90_000), engine={"stalled": True}) as served:
        busy = asyncio.create_task(served.chat(messages=[large]))
        await asyncio.to_thread(preparing.begun.wait)
        refused = await served.chat(messages=[large])
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        preparing.go_on.set()
        await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 1)
        after = asyncio.create_task(served.chat(messages=[large]))
        await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 2)
        served.engine.resume()
        assert [(await task).status for task in (busy, after)] == [200, 200]


async def test_number_and_size_of_images() -> None:
    with seeing(media=MediaPolicy(max_images=2)) as served:
        said = await refused(served, part(RED), part(RED), part(RED))
        assert said.startswith("messages: messages[0].content[2] is one image too many: 2 are taken")
        assert "--limit-mm-per-prompt" in said
    with seeing(media=MediaPolicy(max_images=0)) as served:
        assert "0 are taken" in await refused(served, part(RED))
    size = len(CAT.read_bytes())
    with seeing(media=MediaPolicy(max_total_bytes=2 * size)) as served:
        assert "limit of" in await refused(served, *[part(CAT.read_bytes() + bytes([k])) for k in range(3)])
    with seeing(media=MediaPolicy(max_total_pixels=2 * RED.width * RED.height)) as served:
        said = await refused(served, *[part(picture(2, 3, colour)) for colour in ("red", "green", "blue")])
        assert "content[2] makes all images larger than this server's limit of" in said
        assert (await served.chat(messages=[user(*[part(RED)] * 3)])).status == 200


async def test_text_models_say_so() -> None:
    with serving() as served:
        said = await refused(served, part(RED))
        assert said.startswith(
            "messages: messages[0].content[0] is of type 'image_url', but this model takes text only"
        )
        said = await refused(served, text("a"), mm_processor_kwargs={})
        assert said.startswith(
            "mm_processor_kwargs: mm_processor_kwargs is not supported: this model takes text only"
        )


async def test_bodies_may_be_as_large_as_images_are() -> None:
    large = {"messages": [user(part(b"no image" * 2**19))]}
    with serving() as served:
        assert (await served.post("/v1/chat/completions", large)).status == 413
    with seeing() as served:
        assert "is not an image" in await refused(served, part(b"no image" * 2**19))
    with seeing(max_body_bytes=4096) as served:
        answered = await served.post("/v1/chat/completions", large)
        assert "limit of 4096 bytes" in answered.error["message"]


async def test_files_of_operators(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(CAT.read_bytes())
    with seeing(media=MediaPolicy(allowed_directory=tmp_path)) as served:
        assert "is outside of" in await refused(served, {"image_url": f"file://{CAT}"})
