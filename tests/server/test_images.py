"""Images over HTTP: what reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxserve.media.policy import MediaPolicy
from jaxserve.server.prepared_chat import PreparedChat, prepare_chat
from tests.media.photos import CAT
from tests.server.openai_client import openai_client
from tests.server.seeing import BLUE, RED, prompt_of, refused, refused_next, seeing
from tests.server.serving import PARIS, listening
from tests.vision import PAD, data_url, marker, part, picture, text, user


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
        async with listening(served) as url, openai_client(url) as client:
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
            ({"max_pixels": 28 * 28 * 5 - 1}, 4),
            ({"size": {"longest_edge": 28 * 28 * 25}}, 25),
        ):
            await served.chat(messages=[user(part(picture(6, 6)))], mm_processor_kwargs=kwargs)
            assert served.engine.submitted[-1].images[0].num_tokens == tokens
    with seeing() as served:
        said = await refused(served, part(RED), mm_processor_kwargs={"max_pixels": 10**8})
        assert said == (
            "mm_processor_kwargs: mm_processor_kwargs: max_pixels is 100000000, and the largest images that this "
            "server takes have 50176."
        )
        for parts in ([part(RED)], [text("no image")]):
            assert "'fps' is not known" in await refused(served, *parts, mm_processor_kwargs={"fps": 1})
        assert "must be an object" in await refused(served, part(RED), mm_processor_kwargs=3)


async def test_bounds_between_whole_tokens() -> None:
    largest = {"max_pixels": 64 * 28 * 28 + 500}  # 64 tokens, as the tower takes
    with seeing(media=MediaPolicy(processor_kwargs=largest)) as served:
        for kwargs in (None, largest):
            await served.chat(messages=[user(part(picture(40, 40)))], mm_processor_kwargs=kwargs)
            assert served.engine.submitted[-1].images[0].num_tokens == 64
        assert "max_pixels is 50960" in await refused_next(
            served, part(RED), mm_processor_kwargs={"max_pixels": 65 * 28 * 28}
        )
    with seeing(media=MediaPolicy(processor_kwargs={"min_pixels": 64 * 28 * 28})) as served:
        for across in range(1, 8):  # none has 64 tokens, and enlarging by whole tokens would go beyond
            assert (await served.chat(messages=[user(part(picture(across, 3)))])).status == 200
            assert 32 <= served.engine.submitted[-1].images[0].num_tokens <= 64


async def test_large_images_are_shrunk_to_what_the_tower_takes() -> None:
    with seeing() as served:
        await served.chat(messages=[user(part(picture(40, 40)))])
        assert served.engine.submitted[0].images[0].num_tokens == 64
        said = await refused_next(served, part(picture(100, 1)))
        assert "becomes 80 tokens, and an image may have 64" in said


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


async def test_urls_are_let_go_once_images_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[PreparedChat] = []

    async def recorded(*arguments: Any) -> PreparedChat:
        prepared.append(await prepare_chat(*arguments))
        return prepared[0]

    monkeypatch.setattr("jaxserve.server.chat.prepare_chat", recorded)
    forms = [
        part(RED, detail="low"),
        {"image_url": data_url(BLUE)},
        {"type": "input_image", "image_url": data_url(RED)},
    ]
    with seeing() as served:
        answered = await served.chat(messages=[user(text("see"), *forms)])
        assert answered.status == 200
        assert answered.headers["x-ignored-params"] == "messages[0].content[1].image_url.detail"
    fields = prepared[0].taken.fields
    assert len(json.dumps([fields.messages, prepared[0].plan.fields.messages])) < 800
    assert fields.messages[0]["content"][0] == text("see")
