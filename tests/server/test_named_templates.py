"""Our own chat templates: found by vLLM's names, complete, and what they write for one conversation with everything.

The prompts in tests/data/chat_templates were read through by eye; `python -m tests.server.test_named_templates` writes
them anew.
"""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli.main import parse
from jaxserve.cli.server_flags import server_settings
from jaxserve.errors import ConfigError
from jaxserve.server.call_writing import call_writer
from jaxserve.server.chat_templates import named_template, template_names
from jaxserve.server.parsing.answer_format import make_answer_format
from jaxserve.server.parsing.events import CallArguments, CallStart, Content
from jaxserve.server.tool_parsers.registry import TOOL_FORMATS
from jaxserve.text import template_sandbox
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tool_text import hermes_call
from tests.text.conversations import Marked

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "tests" / "data" / "chat_templates"
NAMES = template_names()

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ARGUMENTS = '{"city": "Ro\\"me", "days": 2, "more": {"a": [true, null, 1.5]}}'
CALLS: list[Any] = [
    {"id": f"chatcmpl-tool-{k:09}", "type": "function", "function": {"name": name, "arguments": arguments}}
    for k, (name, arguments) in enumerate((("get_weather", ARGUMENTS), ("now", None)))
]
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": "I look.", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": CALLS[0]["id"], "content": "18 degrees"},
    {"role": "tool", "tool_call_id": CALLS[1]["id"], "content": '{"hour": 3}'},
    {"role": "assistant", "content": "18 degrees."},
    {"role": "user", "content": "Thanks"},
]

# Formats that have no system turn, or one at the start alone.
ONE_SYSTEM = {"gemma3_pythonic", "granite_20b_fc", "hunyuan_a13b", "mistral", "mistral_parallel"}


# What ends an assistant's turn, which the model writes as a token that ends the answer.
ENDS = (
    "\n",
    "<EOS>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eos|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
)


def compiled(name: str) -> ChatTemplate:
    source = named_template(name)
    assert source is not None
    return ChatTemplate(source, {"bos_token": "<BOS>", "eos_token": "<EOS>"})


def prompts_of(name: str) -> str:
    """The whole conversation, the one that waits for an answer to results, and one without tools."""
    template = compiled(name)
    return "\n=====\n".join(
        (
            template.render(MESSAGES, tools=TOOLS),
            template.render(MESSAGES[1:5], tools=TOOLS),
            template.render(MESSAGES[1:2]),
        )
    )


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "_strftime_now", lambda format: f"<{format}>")


@pytest.mark.parametrize("name", NAMES)
def test_prompts(name: str) -> None:
    assert prompts_of(name) == (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tool_")])
def test_templates_for_tools_need_no_help(name: str) -> None:
    template = compiled(name)
    short = name.removeprefix("tool_chat_template_").removesuffix(".jinja")
    expected = ["it writes no system messages but the first: others open the next user's message"]
    assert list(template.traits.shortcomings) == (expected if short in ONE_SYSTEM else [])
    assert template.traits.takes_bare_tools
    for said in ("Be brief.", "I look.", "18 degrees", "get_weather", "The city"):
        assert said in template.render(MESSAGES, tools=TOOLS)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_vanishes(name: str) -> None:
    template = compiled(name)
    for seed in range(30):
        conversation = Marked(seed)
        prompt = template.render(conversation.messages, tools=TOOLS, wants_tool_calls=True)
        assert [mark for mark in conversation.marks if mark not in prompt] == [], (seed, prompt)
        assert "get_weather" in prompt


@pytest.mark.parametrize("name", NAMES)
def test_final_messages_can_be_continued(name: str) -> None:
    prompt = compiled(name).render(
        [*MESSAGES, {"role": "assistant", "content": "You are wel"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert prompt.endswith("You are wel")


def parser_named_in(source: str) -> str:
    found = re.search(r"Parser: ([\w-]+)|Parser and reasoning parser: ([\w-]+)", source)
    assert found is not None
    return found[1] or found[2]


# Formats whose calls stand alone: with text before them they are text.
ALONE = ("pythonic", "llama4_pythonic", "xlam")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tool_")])
@pytest.mark.parametrize("text", ["", "I look."])
def test_the_familys_parser_reads_what_the_template_writes(name: str, text: str) -> None:
    template = compiled(name)
    parser_name = parser_named_in(template.source)
    if parser_name in ALONE:
        text = ""
    asked = template.render(MESSAGES[:2], tools=TOOLS)
    answered = template.render(
        [*MESSAGES[:2], {**MESSAGES[2], "content": text or None}], tools=TOOLS, add_generation_prompt=False
    )
    answer = answered.removeprefix(asked)
    assert answer != answered
    for end in ENDS:
        answer = answer.removesuffix(end)
    events = []
    thinks = re.search(r"reasoning parser: ([\w-]+)", template.source) if "<think>" in answer else None
    parser = make_answer_format(parser_name, thinks and thinks[1]).parser(tools=TOOLS, prompt=asked)
    for piece in (answer[: len(answer) // 2], answer[len(answer) // 2 :]):
        events += parser.push(piece, [])
    events += parser.finish()
    calls = [event for event in events if isinstance(event, CallStart)]
    assert [call.name for call in calls] == ["get_weather", "now"]
    for index, expected in enumerate((json.loads(ARGUMENTS), {})):
        arguments = "".join(
            event.text for event in events if isinstance(event, CallArguments) and event.index == index
        )
        assert json.loads(arguments or "{}") == expected
    assert "".join(event.text for event in events if isinstance(event, Content)).strip() == text


WRITTEN = [name for name in sorted(TOOL_FORMATS) if name == "hermes" or call_writer(name) is not hermes_call]


@pytest.mark.parametrize("parser_name", WRITTEN)
def test_a_call_is_written_so_that_its_parser_reads_it(parser_name: str) -> None:
    arguments = {"city": "Rome", "days": 2}
    text = call_writer(parser_name)("get_weather", json.dumps(arguments))
    parser = make_answer_format(parser_name, None).parser(tools=TOOLS, prompt="")
    start, *rest = [*parser.push(text, []), *parser.finish()]
    assert isinstance(start, CallStart)
    assert start.name == "get_weather"
    assert json.loads("".join(event.text for event in rest if isinstance(event, CallArguments))) == arguments
    assert not any(isinstance(event, Content) for event in rest)


def test_every_file_is_package_data() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    (pattern,) = package_data["jaxserve.server.chat_templates"]
    files = [
        path.name for path in (ROOT / "server" / "chat_templates").iterdir() if path.suffix not in (".py", "")
    ]
    assert files
    assert all(fnmatch.fnmatch(file, pattern) for file in files)


# What the documentation of vLLM has on its command lines.
DOCUMENTED = [
    "deepseekr1",
    "deepseekv3",
    "deepseekv31",
    "functiongemma",
    "granite",
    "granite_20b_fc",
    "internlm2_tool",
    "llama3.1_json",
    "llama3.2_json",
    "llama3.2_pythonic",
    "llama4_pythonic",
    "mistral",
    "mistral_parallel",
    "toolace",
    "xlam_llama",
    "xlam_qwen",
]


@pytest.mark.parametrize("short", DOCUMENTED)
def test_names_of_vllms_documentation(short: str, serve_settings: Callable[[str], Any]) -> None:
    file = f"tool_chat_template_{short}.jinja"
    source = (ROOT / "server" / "chat_templates" / file).read_text(encoding="utf-8")
    for given in (file, f"examples/{file}", f"/vllm-workspace/examples/{file}", short):
        assert serve_settings(given).chat_template == source


@pytest.fixture
def serve_settings() -> Callable[[str], Any]:
    return lambda given: server_settings(parse(["serve", "m", "--chat-template", given]))


def test_a_file_that_is_there_wins(
    serve_settings: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hermes").write_text("mine {{ messages }}")
    assert serve_settings("hermes").chat_template == "mine {{ messages }}"
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        serve_settings("latin")
    with pytest.raises(ConfigError, match="Is a directory"):
        serve_settings(".")


def test_other_names(serve_settings: Callable[[str], Any]) -> None:
    assert serve_settings("tool_use").chat_template == "tool_use"  # the model may know it
    for given in ("examples/tool_chat_template_nobodys.jinja", "./hermes2"):
        with pytest.raises(
            ConfigError, match=r"no template of ours; those are template_chatml\.jinja, tool_chat_.*"
        ):
            serve_settings(given)


if __name__ == "__main__":
    template_sandbox._strftime_now = lambda format: f"<{format}>"
    for each in NAMES:
        (PROMPTS / f"{each}.txt").write_text(prompts_of(each), encoding="utf-8")
