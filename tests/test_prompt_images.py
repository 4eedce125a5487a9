"""Images in Python: prompts with multi_modal_data, conversations with PIL images, and what is wrong with either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.h100.models import write_model
from jaxserve.assembly import EngineParts, assemble
from jaxserve.async_llm import AsyncLLM
from jaxserve.cli.plan import make_plan
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, RequestError
from jaxserve.llm import LLM
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.media.policy import MediaPolicy
from jaxserve.sampling_params import SamplingParams
from tests.scripted import ScriptedClient, saying, scripted_info
from tests.tiny import EOS, byte_tokenizer
from tests.vision import PAD, TEMPLATE, TOKENS, marker, part, picture, text, user, vision_info

DEFAULTS = GenerationDefaults(eos_token_ids=(EOS,))
PARAMS = SamplingParams(temperature=0, max_tokens=8)
RED, BLUE = picture(2, 3), picture(4, 1, "blue")
ONE = "<|vision_start|><|image_pad|><|vision_end|>"


def parts(media: MediaPolicy | None = None, **info: Any) -> EngineParts:
    client = ScriptedClient(saying([*b"A cat."]), info=scripted_info(**vision_info(**info)))
    return EngineParts(client, byte_tokenizer(chat_template=TEMPLATE, special=TOKENS), DEFAULTS, media=media)


@pytest.fixture
def engine() -> EngineParts:
    return parts()


@pytest.fixture
def llm(engine: EngineParts) -> Iterator[LLM]:
    with LLM.from_parts(engine) as llm:
        yield llm


def shown(engine: EngineParts, i: int = 0) -> str:
    """The i-th prompt that the engine got."""
    assert isinstance(engine.client, ScriptedClient)
    return engine.tokenizer.decode(engine.client.submitted[i].prompt_token_ids, skip_special_tokens=False)


def images(engine: EngineParts, i: int = 0) -> list[tuple[int, int]]:
    """Offset and tokens of each image of the i-th prompt."""
    assert isinstance(engine.client, ScriptedClient)
    return [(image.offset, image.num_tokens) for image in engine.client.submitted[i].images]


def test_an_image_that_nobody_has_read_yet_may_come_several_times(
    llm: LLM, engine: EngineParts, tmp_path: Path
) -> None:
    Image.effect_noise((1500, 1500), 50).save(tmp_path / "noise.png")  # takes a while to decode
    with Image.open(tmp_path / "noise.png") as noise:
        llm.generate({"prompt": ONE * 4, "multi_modal_data": {"image": [noise] * 4}}, PARAMS, use_tqdm=False)
    assert isinstance(engine.client, ScriptedClient)
    assert len({image.content_hash for image in engine.client.submitted[0].images}) == 1


def test_generate_as_users_of_vllm_write_it(llm: LLM, engine: EngineParts) -> None:
    prompts = [
        {"prompt": f"a{ONE}b", "multi_modal_data": {"image": RED}},
        {"prompt": f"{ONE}{ONE}", "multi_modal_data": {"image": [RED, BLUE]}},
        {
            "prompt_token_ids": [65, PAD],
            "multi_modal_data": {"image": RED},
            "mm_processor_kwargs": {"max_pixels": 2 * 784},
        },
        {"prompt": "text alone", "multi_modal_data": {"image": []}},
        {"prompt": "text alone", "multi_modal_data": None},
    ]
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)  # pyright: ignore[reportArgumentType]  # plain dicts
    assert [output.outputs[0].text for output in outputs] == ["A cat."] * 5
    assert [output.prompt for output in outputs[:2]] == [f"a{ONE}b", f"{ONE}{ONE}"]
    assert shown(engine) == f"a{marker(6)}b"
    assert shown(engine, 1) == f"{marker(6)}{marker(4)}"
    assert [images(engine, i) for i in range(4)] == [[(2, 6)], [(1, 6), (9, 4)], [(1, 1)], []]
    assert outputs[0].prompt_token_ids is not None
    assert len(outputs[0].prompt_token_ids) == 10


def test_prompts_whose_placeholders_are_written_out_already(llm: LLM, engine: EngineParts) -> None:
    prompt = {"prompt_token_ids": [65, *[PAD] * 6, 66], "multi_modal_data": {"image": RED}}
    llm.generate(prompt, PARAMS, use_tqdm=False)  # pyright: ignore[reportArgumentType]  # a plain dict
    assert shown(engine) == f"A{'<|image_pad|>' * 6}B"
    assert images(engine) == [(1, 6)]


def test_chat_takes_pil_images_and_urls(llm: LLM, engine: EngineParts) -> None:
    conversation = [
        user({"type": "image_pil", "image_pil": RED}, text("or"), part(BLUE), {"image_pil": BLUE})
    ]
    [output] = llm.chat(conversation, PARAMS, use_tqdm=False)
    assert output.outputs[0].text == "A cat."
    assert shown(engine) == (
        f"<|im_start|>user\n{marker(6)}or{marker(4)}{marker(4)}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert isinstance(engine.client, ScriptedClient)
    first, second, third = engine.client.submitted[0].images
    assert second.content_hash == third.content_hash != first.content_hash


def test_chat_takes_bounds(llm: LLM, engine: EngineParts) -> None:
    llm.chat(
        [user({"image_pil": picture(6, 6)})],
        PARAMS,
        use_tqdm=False,
        mm_processor_kwargs={"max_pixels": 4 * 784},
    )
    assert images(engine) == [(7, 4)]


def test_continued_messages_and_images(llm: LLM) -> None:
    conversation = [user(text("What?")), {"role": "assistant", "content": [text("This: "), part(RED)]}]
    prompt = llm.render_chat(conversation, continue_final_message=True)
    assert prompt.text is not None
    assert prompt.text.endswith(f"<|im_start|>assistant\nThis: {ONE}")


def test_the_owner_keeps_the_image(llm: LLM) -> None:
    image = RED.convert("RGBA")
    llm.chat([user({"image_pil": image})], PARAMS, use_tqdm=False)
    assert (image.mode, image.size) == ("RGBA", (56, 84))


def test_several_answers_share_the_images(llm: LLM, engine: EngineParts) -> None:
    llm.chat([user({"image_pil": RED})], SamplingParams(n=2, max_tokens=1, seed=1), use_tqdm=False)
    assert isinstance(engine.client, ScriptedClient)
    one, two = engine.client.submitted
    assert one.images[0] is two.images[0]


@pytest.mark.parametrize(
    ("prompt", "param", "says"),
    [
        ({"prompt": "a", "multi_modal_data": {"image": RED}}, "prompt", "has 0 times <|image_pad|>"),
        ({"prompt": ONE * 2, "multi_modal_data": {"image": RED}}, "prompt", "has 2 times <|image_pad|>"),
        ({"prompt": ONE}, "prompt", "has 1 times <|image_pad|>"),
        (ONE, "prompt", "and 0 images"),
        (
            {"prompt": ONE, "multi_modal_data": {"image": "cat.png"}},
            "multi_modal_data",
            "LLM.chat takes URLs",
        ),
        ({"prompt": ONE, "multi_modal_data": {"video": [1]}}, "multi_modal_data", "has 'video'"),
        ({"prompt": ONE, "multi_modal_data": [RED]}, "multi_modal_data", "must be a dict, got list"),
        (
            {"prompt": ONE, "multi_modal_uuids": {"image": "u"}},
            "prompt",
            "unknown keys ['multi_modal_uuids']",
        ),
        (
            {"prompt": ONE, "multi_modal_data": {"image": RED}, "mm_processor_kwargs": {"fps": 1}},
            "mm_processor_kwargs",
            "'fps' is not known",
        ),
        (
            {"prompt": ONE, "multi_modal_data": {"image": [RED, picture(200, 1).resize((6000, 9))]}},
            "multi_modal_data",
            "multi_modal_data['image'][1] has 6000 x 9 pixels",
        ),
    ],
)
def test_wrong_prompts(llm: LLM, engine: EngineParts, prompt: Any, param: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt, PARAMS, use_tqdm=False)
    assert caught.value.param == param
    assert says in str(caught.value)
    assert isinstance(engine.client, ScriptedClient)
    assert engine.client.submitted == []


def test_text_models_take_no_images() -> None:
    client = ScriptedClient(saying([65]))
    with LLM.from_parts(EngineParts(client, byte_tokenizer(), DEFAULTS)) as llm:
        with pytest.raises(
            RequestError, match="multi_modal_data is not supported: this model takes text only"
        ):
            llm.generate({"prompt": "a", "multi_modal_data": {"image": RED}}, PARAMS)
        with pytest.raises(RequestError, match="mm_processor_kwargs is not supported: this model takes text"):
            llm.generate({"prompt": "a", "mm_processor_kwargs": {"max_pixels": 1}}, PARAMS)
        with pytest.raises(
            RequestError, match=r"content\[0\] is of type 'image_pil', but this model takes text"
        ):
            llm.chat([user({"type": "image_pil", "image_pil": RED})], PARAMS)


async def test_async_prompts_are_prepared_off_the_loop() -> None:
    engine = parts()
    llm = AsyncLLM(engine.client, engine.tokenizer, DEFAULTS)
    try:
        prompt: Any = {"prompt": f"a{ONE}", "multi_modal_data": {"image": RED}}
        with pytest.raises(RequestError, match="pass what `await prepare"):
            llm.generate(prompt, PARAMS)
        outputs = [output async for output in llm.generate(await llm.prepare(prompt), PARAMS)]
        assert outputs[-1].outputs[0].text == "A cat."
        assert shown(engine) == f"a{marker(6)}"
    finally:
        llm.shutdown()


def test_wrong_settings_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mm_processor_kwargs: 'fps' is not known"):
        LLM.from_parts(parts(MediaPolicy(processor_kwargs={"fps": 1})))
    with pytest.raises(ConfigError, match=r"allowed_local_media_path=.*: not a directory"):
        MediaPolicy.of(EngineConfig("m", allowed_local_media_path=str(tmp_path / "none")))
    assert MediaPolicy.of(EngineConfig("m", allowed_local_media_path="")).allowed_directory is None


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"max_pixels": "big"}, "max_pixels must be a number of pixels"),
        ({"max_pixels": 700}, "max_pixels must be at least 784"),
        ({"min_pixels": 800, "max_pixels": 1500}, "min_pixels is 800, and no image of whole tokens"),
        ({"fps": 2}, "'fps' is not known"),
    ],
)
def test_wrong_bounds_stop_the_start_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr("jaxserve.engine.replicas.build_replicas", lambda *_: pytest.fail("too late"))
    model = str(write_model("tinyvl", tmp_path))
    config = EngineConfig(model, load_format="dummy", mm_processor_kwargs=kwargs)
    with pytest.raises(ConfigError, match=f"mm_processor_kwargs: {says}"):
        assemble(config)
    with pytest.raises(ConfigError, match=f"mm_processor_kwargs: {says}"):
        make_plan(config)


def test_the_operators_words_become_a_policy(tmp_path: Path) -> None:
    config = EngineConfig(
        "m",
        limit_mm_per_prompt={"image": {"count": 3, "width": 512}, "video": 0},
        allowed_media_domains=["Images.Example.COM"],
        allowed_local_media_path=str(tmp_path),
    )
    policy = MediaPolicy.of(config)
    assert (policy.max_images, policy.allowed_domains) == (3, ("images.example.com",))
    assert policy.allowed_directory == tmp_path
    assert MediaPolicy.of(EngineConfig("m")) == MediaPolicy()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"limit_mm_per_prompt": 4}, "give an object"),
        ({"limit_mm_per_prompt": {"picture": 4}}, "give numbers by kind"),
        ({"limit_mm_per_prompt": {"image": "4"}}, "give numbers by kind"),
        ({"limit_mm_per_prompt": {"image": -1}}, "none below 0"),
        ({"mm_processor_kwargs": [1]}, "give an object"),
        ({"allowed_media_domains": "example.com"}, "give a list of hosts"),
    ],
)
def test_wrong_words_of_the_operator(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig("m", **fields)
