"""`jaxserve toolcheck`: passes parsers that are right, and shows where others go wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jaxserve.cli.main import main
from jaxserve.errors import ConfigError
from jaxserve.server.toolcheck.replay import check, num_planned, tokens_of
from jaxserve.server.toolcheck.subjects import BuiltIn
from jaxserve.server.toolcheck.texts import Sample, read_samples, samples_for

EXAMPLE = Path(__file__).parents[3] / "examples" / "tool_parser_plugin.py"

# Calls are `@name;`.  `{broken}` is what the test breaks.
PLUGIN = """
import re
from vllm.entrypoints.openai.protocol import (DeltaFunctionCall, DeltaMessage, DeltaToolCall,
    ExtractedToolCallInformation, FunctionCall, ToolCall)
from vllm.entrypoints.openai.tool_parsers import ToolParser, ToolParserManager

@ToolParserManager.register_module(["at_sign", "at_sign_too"])
class AtSign(ToolParser):
    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.end_id = self.vocab.get("<end>")
        assert self.end_id is not None

    def extract_tool_calls(self, model_output, request):
        calls = [ToolCall(function=FunctionCall(name=name, arguments='{"a": 1}'))
                 for name in re.findall("@(.*?);", model_output)]
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls,
                                            content=re.sub("@.*", "", re.sub("@.*?;", "", model_output)))

    def extract_tool_calls_streaming(self, previous_text, current_text, delta_text, previous_token_ids,
                                     current_token_ids, delta_token_ids, request):
        {broken}
        before = re.sub("@.*", "", re.sub("@.*?;", "", previous_text))
        now = re.sub("@.*", "", re.sub("@.*?;", "", current_text))
        known = len(re.findall("@(.*?);", previous_text))
        calls = [DeltaToolCall(index=i, function=DeltaFunctionCall(name=name, arguments='{"a":1}'))
                 for i, name in enumerate(re.findall("@(.*?);", current_text)) if i >= known]
        return DeltaMessage(content=now[len(before):] or None, tool_calls=calls)
"""


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Answers with calls of the plug-in's."""
    file = tmp_path / "texts.jsonl"
    lines = ['"Hé @f; 🎉 @g;"', "plain @f;", json.dumps({"text": "no call"})]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def plugin(tmp_path: Path, broken: str = "pass") -> str:
    file = tmp_path / "at_sign_plugin.py"
    file.write_text(PLUGIN.replace("{broken}", broken), encoding="utf-8")
    return str(file)


def toolcheck(*arguments: str) -> int:
    return main(["toolcheck", "--disable-tqdm", *arguments])


def test_the_example_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    """The plug-in that we show to others."""
    assert toolcheck("--plugin", str(EXAMPLE), "--seed", "3") == 0
    assert "fenced_json" in capsys.readouterr().out


def test_built_in_parsers_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Several, each with answers of its own format; calls are found in them."""
    assert toolcheck("pythonic", "gemma4") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["pythonic", "gemma4"]
    assert all("same" in line and " 0 calls" not in line for line in out)


def test_a_right_plugin(tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments are compared as JSON unless told otherwise; a class with two names is checked once."""
    file = plugin(tmp_path)
    assert toolcheck("--plugin", file, "--texts", texts) == 0
    assert capsys.readouterr().out.startswith("at_sign: 3 answers with 3 calls")
    assert toolcheck("--plugin", file, "--texts", texts, "--exact", "at_sign_too") == 1
    out = capsys.readouterr().out
    assert "at_sign_too: streamed and not streamed differ" in out
    assert "call 0: the arguments from character 5: '1}' not streamed, ' 1}'" not in out
    assert "' 1}' not streamed, '1}' streamed" in out


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        # the text before a call that comes in one piece with it is lost
        ("if '@' in delta_text: previous_text = current_text", "content from character 0"),
        # only when a call is cut between its name and its end
        (
            "if previous_text.endswith('@f'): current_text = current_text.replace('@f', '@e')",
            "the name is 'f'",
        ),
        # only when a character comes in parts
        ("if delta_text == '': raise IndexError('empty delta')", "only one of them raises"),
        # only when the answer is cut off there
        ("if current_text.endswith(' ca'): return None", "'all' not streamed"),
    ],
)
def test_wrong_plugins(
    broken: str, told: str, tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was given, both results, and where they differ first."""
    assert toolcheck("--plugin", plugin(tmp_path, broken), "--texts", texts) == 1
    out = capsys.readouterr().out
    assert "at_sign: streamed and not streamed differ" in out
    assert told in out
    for word in ("in pieces", "not streamed", "streamed", "difference"):
        assert f"\n  {word:13}" in out


def test_no_call_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A check that checks nothing says so."""
    texts = tmp_path / "texts"
    texts.write_text("nothing\n")
    assert toolcheck("--plugin", plugin(tmp_path), "--texts", str(texts)) == 0
    assert "none of the answers has a call" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["hermse"], "no such parser"),
        (["--plugin", str(EXAMPLE), "other"], "has no tool parser 'other'; it has fenced_json"),
        (["--plugin", "/nowhere.py"], "no such file"),
        (["hermes", "--texts", "/nowhere.txt"], "--texts /nowhere.txt: No such file"),
        (["hermes", "--tokenizer", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_checked(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A usage error, in one line."""
    assert toolcheck(*arguments) != 0
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_texts_from_files(tmp_path: Path) -> None:
    """JSON, JSON lines, or plain lines."""
    file = tmp_path / "texts"

    def read(content: str) -> list[Sample]:
        file.write_text(content, encoding="utf-8")
        return read_samples(str(file))

    tools = [{"type": "function", "function": {"name": "f"}}]
    assert [sample.text for sample in read('["a\\nb", {"text": "c"}]')] == ["a\nb", "c"]
    assert read(json.dumps({"text": "c", "tools": tools})) == [Sample("c", tools)]
    assert [sample.text for sample in read('{"name": "f"}\n\nplain\n"x"\n')] == [
        '{"name": "f"}',
        "plain",
        "x",
    ]
    for bad in ("", "[]", "[1]", '[{"txt": "a"}]', '[{"text": "a", "tools": [{}]}]'):
        with pytest.raises(ConfigError, match="--texts"):
            read(bad)


def test_replays_are_what_was_planned() -> None:
    """Every token is cut at once, bytes of characters apart; the bar counts them all."""
    subject = BuiltIn("hermes", None)
    samples = samples_for("hermes")[:3]
    done: list[int] = []
    findings = check(subject, samples, 0, done.append)
    assert findings.divergence is None
    assert findings.num_replays == sum(done) == num_planned(subject, samples)
    text = "é🎉" + "".join(chr(random.Random(1).randrange(0x100, 0xD000)) for _ in range(5))
    tokens = tokens_of(subject, text)
    assert len(tokens) == len(text.encode())
    assert "".join(token.text for token in tokens) == text
    assert tokens[0].text == ""
