"""Chat templates behind the server: which one counts, what requests tell it, and what the operator is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.server.conversation import MAX_REQUEST_TEMPLATE, ignored_template_fields, template_of
from jaxserve.server.protocol import TokenizeRequest
from jaxserve.server.state import ServerState
from tests.server.serving import QUESTION, Serving, serving
from tests.tiny import CHAT_TEMPLATE

TOOLS: list[Any] = [{"type": "function", "function": {"name": "f"}}]
THINKS = "{{ 'loud' if enable_thinking else 'quiet' }}{% for m in messages %}{{ m.content }}{% endfor %}"
EFFORT = "{{ reasoning_effort }}{{ enable_thinking }}{% for m in messages %}{{ m.content }}{% endfor %}"
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


async def prompt_of(served: Serving, **fields: Any) -> str:
    answer = await served.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}], **fields})
    assert answer.status == 200, answer.data
    return served.llm.tokenizer.decode(answer.json["tokens"], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "quietHi"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "loudHi"),
        ({"reasoning_effort": "none"}, "quietHi"),
        ({"reasoning_effort": "low"}, "loudHi"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, "quietHi"),
    ],
)
async def test_thinking(fields: dict[str, Any], prompt: str):
    with serving(chat_template=THINKS) as served:
        assert await prompt_of(served, **fields) == prompt
    with serving(chat_template=THINKS, default_chat_template_kwargs={"enable_thinking": True}) as served:
        assert await prompt_of(served, **fields) == (prompt if fields else "loudHi")


async def test_reasoning_effort_goes_to_templates_that_read_it():
    with serving(chat_template=EFFORT) as served:
        assert await prompt_of(served, reasoning_effort="high") == "highHi"
        kwargs = {"reasoning_effort": "max"}
        assert await prompt_of(served, reasoning_effort="low", chat_template_kwargs=kwargs) == "maxHi"


def test_what_the_template_does_not_read_is_told():
    def ignored(template: str, **fields: Any) -> list[str]:
        with serving(chat_template=template) as served:
            state = ServerState.build(served.llm, served.settings)
            return ignored_template_fields(state, TokenizeRequest(**fields))

    kwargs = {"enable_thinking": True, "mood": 1}
    assert ignored(THINKS, chat_template_kwargs=kwargs, reasoning_effort="low") == [
        "chat_template_kwargs.mood"
    ]
    assert ignored(PLAIN, chat_template_kwargs=kwargs, reasoning_effort="low") == [
        "chat_template_kwargs.enable_thinking",
        "chat_template_kwargs.mood",
        "reasoning_effort",
    ]
    assert ignored(EFFORT, reasoning_effort="low") == ignored(PLAIN) == []


async def test_the_models_template_for_tools():
    with serving() as served:
        served.llm.tokenizer.chat_templates["tool_use"] = (
            "{{ tools | map(attribute='function.name') | join }}" + PLAIN
        )
        assert await prompt_of(served, tools=TOOLS) == "f[user]Hi"
        assert await prompt_of(served) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with serving(chat_template=None) as served:
        served.llm.tokenizer.chat_templates["tool_use"] = PLAIN
        answer = await served.chat()
        assert answer.status == 400
        assert "the model has no chat template" in answer.error["message"]


async def test_the_operator_names_one_of_the_models_templates():
    with serving() as served:
        served.llm.tokenizer.chat_templates["short"] = "short" + PLAIN
        state = ServerState.build(served.llm, type(served.settings)(chat_template="short"))
        template = template_of(state, TokenizeRequest())
        assert template.source == "short" + PLAIN
        with pytest.raises(ConfigError, match=r"neither jinja2 nor the name .* \(it has: default, short\)"):
            ServerState.build(served.llm, type(served.settings)(chat_template="long"))


async def test_tools_are_described_where_the_template_does_not():
    with serving(chat_template=PLAIN) as served:
        prompt = await prompt_of(served, tools=TOOLS)
        assert prompt.startswith("[system]You can call these functions")
        assert '<tool_call>\n{"name": "function_name"' in prompt
    with serving(chat_template=PLAIN, tool_call_parser="llama3_json") as served:
        prompt = await prompt_of(served, tools=TOOLS)
        assert 'like this:\n{"name": "function_name", "parameters": {"argument": "value"}}[user]' in prompt


def test_the_operator_is_told_at_start(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING), serving(chat_template=PLAIN):
        assert "the chat template has limits: it does not show `tools`" in caplog.text
        assert "it writes no tool calls" in caplog.text
        assert len(caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING), serving(chat_template="{{ tools }}" + CHAT_TEMPLATE):
        assert caplog.text == ""


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_default_kwargs_that_cannot_be(name: str):
    with (
        pytest.raises(ConfigError, match=f"default_chat_template_kwargs.*{name}"),
        serving(default_chat_template_kwargs={name: 1}),
    ):
        pass


BAD: list[Any] = [*QUESTION, {"role": "user", "content": "bad"}]
REFUSES_BAD = (
    "{% for m in messages %}\n{% if m.content == 'bad' %}{{ raise_exception('hm') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "param", "message"),
    [
        ("{" * (MAX_REQUEST_TEMPLATE + 1), "chat_template", "at most 50000 characters, got 50001"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "chat_template",
            "was stopped: it takes more than 300,000 steps (line 1)",
        ),
        (REFUSES_BAD, "messages", 'refused messages[1] (role "user"): hm (line 2)'),
        ("hello", "chat_template", "neither jinja2 nor the name"),
    ],
)
async def test_templates_of_requests(template: str, param: str, message: str):
    with serving(trust_request_chat_template=True) as served:
        assert await prompt_of(served, chat_template=PLAIN) == "[user]Hi"
        answer = await served.chat(messages=BAD, chat_template=template)
        assert answer.status == 400
        assert answer.error["param"] == param
        assert message in answer.error["message"]
