"""Reasoning told apart from the answer, with the built-in parsers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scripted import saying
from tests.server.serving import QUESTION, say, serving
from tests.tiny import byte_tokenizer

THINKING_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking is defined %}<think>\n{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
)


async def told(served: Any, **fields: Any) -> tuple[str | None, str | None]:
    """Reasoning and content; the same streamed or not."""
    message = (await served.chat(**fields)).json["choices"][0]["message"]
    chunks = (await served.chat(**fields, stream=True)).chunks
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    parts = {name: "".join(delta.get(name, "") for delta in deltas) for name in ("reasoning", "content")}
    assert parts["reasoning"] == message.get("reasoning", "")
    assert parts["content"] == (message["content"] or "")
    return message.get("reasoning"), message["content"]


@pytest.mark.parametrize(
    ("parser", "text", "parts"),
    [
        ("deepseek_r1", "Hm.\n</think>\n\nParis.", ("Hm.\n", "\n\nParis.")),
        ("deepseek_r1", "<think>Hm.</think>Paris.", ("Hm.", "Paris.")),
        ("deepseek_r1", "Hm", ("Hm", None)),
        ("qwen3", "<think>Hm.</think>Paris.", ("Hm.", "Paris.")),
        ("qwen3", "Paris.", (None, "Paris.")),
    ],
)
async def test_parsers(parser: str, text: str, parts: tuple[str | None, str | None]):
    with serving(say(text), reasoning_parser=parser) as served:
        assert await told(served) == parts


async def test_the_prompt_says_whether_the_model_thinks():
    options: dict[str, Any] = {"reasoning_parser": "qwen3", "chat_template": THINKING_TEMPLATE}
    for thinks, parts in ((True, ("a", "b")), (False, (None, "a</think>b"))):
        with serving(say("a</think>b"), **options) as served:
            assert await told(served, chat_template_kwargs={"enable_thinking": thinks}) == parts


@pytest.mark.parametrize(
    ("said", "text", "parts"),
    [
        ("Paris", " is it.", (None, " is it.")),
        ("<think>Well", ", Paris.</think>Paris.", (", Paris.", "Paris.")),
        ("<think>Well</think>The", " city.", (None, " city.")),
    ],
)
async def test_a_message_that_is_continued(said: str, text: str, parts: tuple[str | None, str | None]):
    with serving(say(text), reasoning_parser="deepseek_r1") as served:
        messages = [*QUESTION, {"role": "assistant", "content": said}]
        assert await told(served, messages=messages, continue_final_message=True) == parts


async def test_what_the_template_does_not_read_is_named():
    with serving() as served:
        answer = await served.chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": True})
        assert answer.headers["x-ignored-params"] == "chat_template_kwargs.enable_thinking, reasoning_effort"
    with serving(chat_template=THINKING_TEMPLATE, strict_params=True) as served:
        assert (await served.chat(reasoning_effort="low")).status == 200
        refused = await served.chat(chat_template_kwargs={"enable_thinkin": True})
        assert refused.error["param"] == "chat_template_kwargs.enable_thinkin"


HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Paris."


@pytest.mark.parametrize("fields", [{}, {"tools": [{"function": {"name": "f"}}]}])
async def test_a_tool_parser_that_tells_reasoning_too(fields: dict[str, Any]):
    marks = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
    options: dict[str, Any] = {"tool_call_parser": "openai", "enable_auto_tool_choice": True}
    tokens = byte_tokenizer(special=marks).encode(HARMONY, add_special_tokens=False)
    with serving(saying(tokens), special_tokens=marks, **options) as served:
        assert await told(served, max_tokens=99, **fields) == ("Hm.", "Paris.")
