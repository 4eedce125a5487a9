"""Where the prompts of `jaxserve generate` come from: flags, a text or JSONL file, stdin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxserve.errors import ConfigError

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a conversation


def read_prompts(texts: Sequence[str], path: Path | None, stdin: TextIO) -> list[Prompt]:
    """The prompts of --prompt and --prompts-file in this order; of stdin, one a line, when there is neither.

    A file is one prompt a line; a .jsonl file holds strings, `{"prompt": …}` or `{"messages": […]}`.
    Raises ConfigError naming file and line.
    """
    prompts: list[Prompt] = list(texts)
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() cuts at U+2028, too
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompts-file {path}: {getattr(error, 'strerror', None) or error}"
            ) from error
        prompts += _json_lines(path, lines) if path.suffix == ".jsonl" else _lines(lines)
    elif not texts:
        if stdin.isatty():
            raise ConfigError(
                "no prompt: give --prompt TEXT, --prompts-file FILE, or prompts on stdin, one a line"
            )
        prompts += _lines(stdin)
    if not prompts:
        raise ConfigError("no prompt: the input is empty")
    return prompts


def _lines(lines: Iterable[str]) -> list[str]:
    return [text for line in lines if (text := line.rstrip("\r\n")).strip()]


def _json_lines(path: Path, lines: Sequence[str]) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"--prompts-file {path}, line {number}: not JSON: {error}") from error
        prompt = entry.get("messages", entry.get("prompt")) if isinstance(entry, dict) else entry
        is_conversation = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
        if not prompt or not (isinstance(prompt, str) or is_conversation):
            raise ConfigError(
                f"--prompts-file {path}, line {number}: give a string, "
                '{"prompt": "…"} or {"messages": […]}'
            )
        prompts.append(prompt)
    return prompts
