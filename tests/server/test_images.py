"""Images over HTTP: what reaches the engine, and the fast refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from jaxserve.engine.protocol import CoreRequest
from jaxserve.media.policy import MediaPolicy
from tests.media.photos import CAT
from tests.media.test_image_file import png_head
from tests.media.web import answer, is_allowed, web
from tests.server.serving import PARIS, Serving, listening, serving
from tests.tiny import byte_tokenizer
from tests.vision import PAD, TEMPLATE, TOKENS, data_url, marker, part, picture, text, user, vision_info

RED, BLUE = picture(2, 3), picture(4, 1, "blue")


@contextmanager
def seeing(info: dict[str, Any] | None = None, **options: Any) -> Iterator[Serving]:
    """A server whose model takes images."""
    given: dict[str, Any] = {"chat_template": TEMPLATE, "special_tokens": TOKENS, **options}
    with serving(info=vision_info(**(info or {})), **given) as served:
        yield served


def prompt_of(request: CoreRequest) -> str:
    return byte_tokenizer(special=TOKENS).decode(request.prompt_token_ids, skip_special_tokens=False)


async def refused(served: Serving, *parts: Any, **fields: Any) -> str:
    answered = await served.chat(messages=[user(*parts)], **fields)
    assert answered.status == 400, answered.data
    assert served.engine.submitted == []
    assert answered.error["type"] == "BadRequestError"
    return f"{answered.error['param']}: {answered.error['message']}"


async def test_images_stand_where_the_message_has_them() -> None:
    with seeing() as served:
        messages = [
            {"role": "system", "content": "Be brief."},
            user(text("A"), part(RED), text("or"), part(BLUE), text("?")),
            {"role": "assistant", "content": "A."},
            user(part(RED), text("again")),
        ]
        answered = await served.chat(messages=messages)
        (request,) = served.engine.submitted
    assert answered.json["choices"][0]["message"]["content"] == PARIS
    assert prompt_of(request) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nA{marker(6)}or{marker(4)}?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
        f"<|im_start|>user\n{marker(6)}again<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [image.grid_thw for image in request.images] == [(1, 6, 4), (1, 2, 8), (1, 6, 4)]
    assert [image.num_tokens for image in request.images] == [6, 4, 6]
    for image in request.images:
        span = request.prompt_token_ids[image.offset : image.offset + image.num_tokens]
        assert span == [PAD] * image.num_tokens
        assert len(image.pixels) == image.num_tokens * 4 * 3 * 14 * 14
    first, second, third = request.images
    assert first.content_hash == third.content_hash != second.content_hash
    assert first.pixels[:3] == b"\xff\xff\xff"  # a row of red's red
    assert answered.json["usage"]["prompt_tokens"] == len(request.prompt_token_ids)


@pytest.mark.parametrize(
    "shape",
    [
        {"type": "image_url", "image_url": {"url": data_url(RED)}},
        {"type": "image_url", "image_url": data_url(RED)},
        {"image_url": data_url(RED)},
        {"image_url": {"url": data_url(RED)}},
        {"type": "input_image", "image_url": data_url(RED)},
    ],
)
async def test_every_form_of_an_image_part(shape: dict[str, Any]) -> None:
    with seeing() as served:
        assert (await served.chat(messages=[user(shape)])).status == 200
        assert [image.num_tokens for image in served.engine.submitted[0].images] == [6]


async def test_the_openai_client_streams_an_answer_about_a_photograph() -> None:
    with seeing() as served:
        async with listening(served) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            messages: Any = [user(text("What is it?"), part(CAT.read_bytes()))]
            stream = await client.chat.completions.create(model="scripted", messages=messages, stream=True)
            said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert said == PARIS
        assert [image.grid_thw for image in served.engine.submitted[0].images] == [(1, 10, 16)]


async def test_detail_and_uuid_are_named_as_ignored() -> None:
    with seeing() as served:
        answered = await served.chat(
            messages=[user(part(RED, detail="high"), {**part(BLUE, detail="auto"), "uuid": "u"})]
        )
        assert answered.headers["x-ignored-params"] == (
            "messages[0].content[0].image_url.detail, messages[0].content[1].uuid"
        )
    with seeing(strict_params=True) as served:
        assert "messages[0].content[0].image_url.detail means nothing" in await refused(
            served, part(RED, detail="low")
        )


async def test_bounds_of_a_request_and_of_the_operator() -> None:
    with seeing(media=MediaPolicy(processor_kwargs={"max_pixels": 28 * 28 * 16})) as served:
        for kwargs, tokens in (
            (None, 16),
            ({"max_pixels": 28 * 28 * 4}, 4),
            ({"size": {"longest_edge": 28 * 28 * 25}}, 25),
        ):
            await served.chat(messages=[user(part(picture(6, 6)))], mm_processor_kwargs=kwargs)
            assert served.engine.submitted[-1].images[0].num_tokens == tokens
    with seeing() as served:
        said = await refused(served, part(RED), mm_processor_kwargs={"max_pixels": 10**8})
        assert said == (
            "mm_processor_kwargs: mm_processor_kwargs: max_pixels must be at most 50176 for this server, got 100000000."
        )
        for parts in ([part(RED)], [text("no image")]):
            assert "'fps' is not known" in await refused(served, *parts, mm_processor_kwargs={"fps": 1})
        assert "must be an object" in await refused(served, part(RED), mm_processor_kwargs=3)


async def test_large_images_are_shrunk_to_what_the_tower_takes() -> None:
    with seeing() as served:
        await served.chat(messages=[user(part(picture(40, 40)))])
        assert served.engine.submitted[0].images[0].num_tokens == 64
        said = await refused_next(served, part(picture(100, 1)))
        assert "becomes 80 tokens, and an image may have 64" in said


async def refused_next(served: Serving, *parts: Any) -> str:
    served.engine.submitted.clear()
    return await refused(served, *parts)


async def test_image_tokens_count_against_the_context() -> None:
    with seeing({"max_model_len": 64}) as served:
        said = await refused(served, part(picture(4, 8)), part(picture(4, 8)))
        assert "have 64 tokens, and this model's maximum context length is 64 tokens" in said
        said = await refused(served, part(picture(4, 4)), text("x" * 40))
        assert "your prompt has" in said


async def test_truncation_keeps_images_whole() -> None:
    with seeing() as served:
        messages = [user(part(RED), text("abc"), part(BLUE))]
        whole = (await served.post("/tokenize", {"messages": messages})).json["tokens"]
        second = len(whole) - 1 - whole[::-1].index(PAD) - 3  # where the blue one begins
        await served.chat(messages=messages, truncate_prompt_tokens=len(whole) - second)
        (request,) = served.engine.submitted
        assert request.prompt_token_ids == whole[second:]
        assert [(image.offset, image.num_tokens) for image in request.images] == [(0, 4)]
        answered = await served.chat(messages=messages, truncate_prompt_tokens=len(whole) - second - 1)
        assert answered.error["param"] == "truncate_prompt_tokens"
        assert "would begin in the middle of an image" in answered.error["message"]


async def test_tokenize_and_render_show_every_token() -> None:
    with seeing() as served:
        body = {
            "messages": [user(part(RED), text("What?"))],
            "mm_processor_kwargs": {"max_pixels": 28 * 28 * 2},
        }
        rendered = (await served.post("/v1/chat/completions/render", body)).json
        tokens = (await served.post("/tokenize", body)).json["tokens"]
        assert rendered["prompt"] == (
            f"<|im_start|>user\n{marker(1)}What?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert rendered["token_ids"] == tokens
        assert served.engine.submitted == []


async def test_variables_of_the_template() -> None:
    with seeing() as served:
        await served.chat(
            messages=[user(part(RED), part(BLUE))], chat_template_kwargs={"add_vision_id": True}
        )
        assert f"Picture 1: {marker(6)}Picture 2: {marker(4)}" in prompt_of(served.engine.submitted[0])


async def test_templates_that_write_text_get_images_too() -> None:
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with seeing(chat_template=plain) as served:
        await served.chat(messages=[user(text("a"), part(RED), text("b"), part(BLUE))])
        (request,) = served.engine.submitted
        assert prompt_of(request) == f"[user]a\n{marker(6)}\nb\n{marker(4)}"
        assert [image.num_tokens for image in request.images] == [6, 4]


async def test_a_template_that_leaves_images_out_is_told_on() -> None:
    deaf = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
    with seeing(chat_template=deaf) as served:
        said = await refused(served, text("a"), part(RED))
        assert said.startswith("messages: The prompt has 0 times <|image_pad|>")


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
    media = MediaPolicy(
        allowed_domains=("*",),
        allowed_directory=CAT.parent.resolve(),
        fetch_seconds=0.3,
        is_allowed_address=is_allowed,
    )
    with seeing(media=media) as served:
        async with web(pages) as here:
            good = [here.url("/cat.png"), f"file://{CAT}"]
            assert (await served.chat(messages=[user(*({"image_url": url} for url in good))])).status == 200
            first, second = served.engine.submitted[0].images
            assert first.content_hash == second.content_hash
            for path, says in (
                ("/inside", "not a public one"),
                ("/slow", "did not arrive within 0.3 seconds"),
            ):
                assert says in await refused_next(served, {"image_url": here.url(path)})


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


async def test_number_and_size_of_images() -> None:
    with seeing(media=MediaPolicy(max_images=2)) as served:
        said = await refused(served, part(RED), part(RED), part(RED))
        assert said.startswith("messages: messages[0].content[2] is one image too many: 2 are taken")
        assert "--limit-mm-per-prompt" in said
    with seeing(media=MediaPolicy(max_images=0)) as served:
        assert "0 are taken" in await refused(served, part(RED))
    size = len(CAT.read_bytes())
    with seeing(media=MediaPolicy(max_total_bytes=2 * size)) as served:
        assert "limit of" in await refused(served, *[part(CAT.read_bytes())] * 3)


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
