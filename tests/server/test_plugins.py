"""Parser plug-ins behind the HTTP server: whole, streamed, failing, and changing the request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli.main import main
from jaxserve.errors import ConfigError
from tests.conversion.models import write_directory
from tests.scripted import saying
from tests.server.recorded import joined, whole
from tests.server.serving import say, serving
from tests.tiny import TOOL_CALL

EXAMPLE = Path(__file__).parents[2] / "examples" / "tool_parser_plugin.py"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALLS = (
    'Let me see.\n```json\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n```\nand some\n'
    '```json\n{"other": 1}\n```\n```json\n[{"name": "f"}, {"name": "g", "arguments": {}}]\n```'
)
ROOM: dict[str, Any] = {"info": {"max_model_len": 1024}}
AUTO: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "fenced_json"}

PROBES = """
from vllm.entrypoints.openai.protocol import DeltaMessage, ExtractedToolCallInformation
from vllm.entrypoints.openai.tool_parsers import ToolParser, ToolParserManager
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

@ToolParserManager.register_module("picky")
class Picky(ToolParser):
    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        if "<no-such-token>" not in self.vocab:
            raise RuntimeError("could not find <no-such-token>")

@ToolParserManager.register_module("failing")
class Failing(ToolParser):
    supports_required_and_named = False
    def adjust_request(self, request):
        request.skip_special_tokens = False
        request.stop = ["STOP"]
        return request
    def extract_tool_calls(self, model_output, request):
        if "boom" in model_output:
            raise IndexError("list index out of range")
        assert request.tools[0].function.name == "get_weather"
        return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=f"({model_output})")
    def extract_tool_calls_streaming(self, previous_text, current_text, delta_text, *ids):
        if current_text.endswith("boom"):
            raise IndexError("list index out of range")
        return DeltaMessage(content=delta_text)

@ReasoningParserManager.register_module("picky")
class PickyToo(ReasoningParser):
    def __init__(self, tokenizer, *args, **kwargs):
        super().__init__(tokenizer)
        raise RuntimeError("could not find <no-such-token>")

@ReasoningParserManager.register_module("tagged")
class Tagged(BaseThinkingReasoningParser):
    start_token = "<tool_call>"
    end_token = "</tool_call>"
"""


@pytest.fixture
def probes(tmp_path: Path) -> str:
    """A plug-in file with probes."""
    file = tmp_path / "probes.py"
    file.write_text(PROBES, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_example(stream: bool):
    with serving(say(CALLS), **ROOM, tool_parser_plugin=str(EXAMPLE), **AUTO) as served:
        answer = await served.chat(tools=TOOLS, max_tokens=400, stream=stream)
    told = (joined(answer.chunks) if stream else whole(answer.json))[0]
    assert told.text == 'Let me see.\n\nand some\n```json\n{"other": 1}\n```\n'
    assert [(name, json.loads(arguments)) for name, arguments in told.calls] == [
        ("get_weather", {"city": "Zürich"}),
        ("f", {}),
        ("g", {}),
    ]
    assert told.finish_reason == "tool_calls"


async def test_forced_calls_are_plain_json():
    """As in vLLM, unless the parser says that it reads them itself."""
    text = '[{"name": "get_weather", "parameters": {"city": "Oslo"}}]'
    with serving(say(text), **ROOM, tool_parser_plugin=str(EXAMPLE), **AUTO) as served:
        for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            answer = await served.chat(tools=TOOLS, tool_choice=choice, max_tokens=400)
            calls = answer.json["choices"][0]["message"]["tool_calls"]
            assert [call["function"]["arguments"] for call in calls] == ['{"city": "Oslo"}']
            assert "get_weather" in (served.engine.submitted[-1].grammar or "")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failing_plugin_fails_its_request_alone(stream: bool, probes: str):
    settings = {**AUTO, "tool_call_parser": "failing", "tool_parser_plugin": probes}
    with serving(say("so boom"), **settings) as served:
        answer = await served.chat(tools=TOOLS, stream=stream)
        if stream:
            error = next(chunk["error"] for chunk in answer.chunks if "error" in chunk)
        else:
            assert answer.status == 500
            error = answer.error
        assert "Failing failed on this answer: IndexError: list index out of range" in error["message"]
        assert (await served.chat()).status == 200  # without tools the plug-in is not asked


async def test_a_plugin_changes_the_request(probes: str):
    settings = {**AUTO, "tool_call_parser": "failing", "tool_parser_plugin": probes}
    with serving(say("a STOP b"), **settings) as served:
        answer = await served.chat(tools=TOOLS)
        assert answer.json["choices"][0]["message"]["content"] == "(a )"
        assert not served.engine.submitted[-1].params.skip_special_tokens
        await served.chat(tools=TOOLS, tool_choice="none")
        assert served.engine.submitted[-1].params.skip_special_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_plugin_before_calls(stream: bool, probes: str):
    tokens = [TOOL_CALL, *b"I think.", TOOL_CALL + 1, *CALLS.encode()]
    settings = {
        **AUTO,
        "tool_parser_plugin": str(EXAMPLE),
        "reasoning_parser": "tagged",
        "reasoning_parser_plugin": probes,
    }
    with serving(saying(tokens), **ROOM, **settings) as served:
        answer = await served.chat(tools=TOOLS, max_tokens=400, stream=stream)
    told = (joined(answer.chunks) if stream else whole(answer.json))[0]
    assert told.text.startswith("Let me see.")
    assert len(told.calls) == 3
    if stream:
        thoughts = [c["choices"][0]["delta"].get("reasoning") or "" for c in answer.chunks if c["choices"]]
        assert "".join(thoughts) == "I think."
    else:
        assert answer.json["choices"][0]["message"]["reasoning"] == "I think."


def test_what_stops_the_start(probes: str, tmp_path: Path):
    broken = tmp_path / "broken_plugin.py"
    broken.write_text("import os\nos.no_such_thing\n")
    with (
        pytest.raises(ConfigError, match=r"line 2 of .*broken_plugin.py: AttributeError: .*no_such_thing"),
        serving(say(""), tool_parser_plugin=str(broken)),
    ):
        pass
    with (
        pytest.raises(
            ConfigError, match=r"'picky' does not fit this model: .*could not find <no-such-token>"
        ),
        serving(say(""), tool_call_parser="picky", tool_parser_plugin=probes),
    ):
        pass
    with (
        pytest.raises(
            ConfigError, match=r"'pickey': there is no such parser; use one of .*failing.*hermes.*picky"
        ),
        serving(say(""), tool_call_parser="pickey", tool_parser_plugin=probes),
    ):
        pass


@pytest.mark.parametrize("kind", ["tool_call_parser", "reasoning_parser"])
def test_a_parser_that_the_tokenizer_does_not_suit_stops_the_start_before_weights_are_loaded(
    probes: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("jaxserve.engine.replicas.build_replicas", lambda *_: pytest.fail("too late"))
    model = str(write_directory(tmp_path / "model"))
    plugin = "--tool-parser-plugin" if kind == "tool_call_parser" else "--reasoning-parser-plugin"
    parser = f"--{kind.replace('_', '-')}=picky"
    assert main(["serve", model, "--port=0", plugin, probes, parser]) == 2
    told = capsys.readouterr().err
    assert f"{kind}='picky' does not fit this model: " in told
    assert "could not find <no-such-token>" in told
