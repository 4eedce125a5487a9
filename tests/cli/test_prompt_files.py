"""Where prompts come from."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from jaxserve.cli.prompt_files import read_prompts
from jaxserve.errors import ConfigError


def test_stdin_is_one_prompt_a_line() -> None:
    assert read_prompts([], None, io.StringIO("a b\n\n  c\n")) == ["a b", "  c"]


def test_flags_keep_stdin_unread(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("from file\n")
    stdin = io.StringIO("not read\n")
    assert read_prompts(["x"], None, stdin) == ["x"]
    assert read_prompts(["x"], path, stdin) == ["x", "from file"]
    assert stdin.tell() == 0


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '"plain"\n{"prompt": "with\\nline"}\n\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    assert read_prompts([], path, io.StringIO()) == [
        "plain",
        "with\nline",
        [{"role": "user", "content": "x"}],
    ]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_only_line_feeds_end_a_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    quote = '"' if name.endswith(".jsonl") else ""
    path.write_text(
        f"{quote}one\u2028line\x85still{quote}\r\n{quote}two{quote}\n", encoding="utf-8", newline=""
    )
    assert read_prompts([], path, io.StringIO()) == ["one\u2028line\x85still", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ('"a"\n3\n', "line 2: give a string"),
        ('{"text": "a"}', "line 1: give a string"),
    ],
)
def test_faults_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts([], path, io.StringIO())


def test_no_prompt_at_all() -> None:
    with pytest.raises(ConfigError, match="empty"):
        read_prompts([], None, io.StringIO("\n"))
