"""Answers to check a parser with: of its own format, of every format, or from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.server.toolcheck.writers import WRITERS, Calls, Writer


def _tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS: tuple[Mapping[str, Any], ...] = (
    _tool(
        "get_weather",
        city={"type": "string"},
        days={"type": "integer"},
        exact={"type": "boolean"},
        near={"type": ["array", "null"], "items": {"type": "string"}},
        place={"type": "object"},
    ),
    _tool("now"),
)
_CALLS: tuple[Calls, ...] = (
    [("get_weather", {"city": "Paris"})],
    [("now", {})],
    [
        ("get_weather", {"city": 'Zürich "Süd"\n\\ 🎉', "days": 3, "exact": True}),
        ("get_weather", {"near": ["東京", "a,]}"], "place": {"lat": -1.5, "deep": {"none": None}}}),
        ("now", {}),
    ],
)
_PROSE = (
    "",
    "Just text: 1 < 2 and a[0] = {'x': 1}; 🎉 <b>é</b>\n",
    'Call it with <tool_call> or [TOOL_CALLS], as in `{"name": "f"}`.',
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer, and the tools that its request offers."""

    text: str
    tools: Sequence[Mapping[str, Any]] = TOOLS


def fenced(calls: Calls) -> str:
    """Objects in blocks of code, as models write that no format was taught."""
    return "\n".join(
        f"```json\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n```"
        for name, arguments in calls
    )


def harmony(calls: Calls) -> str:
    """Messages on channels, as gpt-oss writes them: thoughts, and a message for each call."""
    messages = [
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{json.dumps(arguments, ensure_ascii=False)}<|call|>"
        for name, arguments in calls
    ]
    return "<|start|>assistant".join(["<|channel|>analysis<|message|>Hm, é.<|end|>", *messages])


def samples_of(writer: Writer) -> list[Sample]:
    """Calls alone, among text, and cut or spoilt in their middle; and text without calls."""
    alone = [writer(calls) for calls in _CALLS]
    among = f"Let me see.\n{alone[0]}\nOr, é: {alone[1]} Done."
    spoilt = f"{alone[0][: len(alone[0]) // 2]}!{alone[1]}"
    return [Sample(text) for text in (*alone, among, spoilt, *_PROSE)]


def samples_for(name: str | None) -> list[Sample]:
    """Those of a built-in format; without a name one of each format, for a parser whose format is not known."""
    if name is not None:
        return samples_of(harmony if name == "openai" else WRITERS[name])
    texts = [writer(_CALLS[0]) for writer in (*WRITERS.values(), harmony, fenced)]
    return [*samples_of(fenced), *map(Sample, dict.fromkeys(texts))]


def read_samples(path: str) -> list[Sample]:
    """The answers in a file: JSON, or one a line.

    Each is a text, or an object with `text` and, if need be, `tools` as a request has them.  A line that is no JSON
    is an answer as it stands.  Raises ConfigError for what cannot be read.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--texts {path}: {reason}") from error
    try:
        whole = json.loads(content)
    except ValueError:
        entries = [_line(line) for line in content.splitlines() if line.strip()]
    else:
        entries = whole if isinstance(whole, list) else [whole]
    if not entries:
        raise ConfigError(f"--texts {path}: there is no text in it")
    return [_sample(entry, f"--texts {path}, entry {number}") for number, entry in enumerate(entries, 1)]


def _line(line: str) -> Any:
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    is_entry = isinstance(entry, str) or (isinstance(entry, dict) and "text" in entry)
    return entry if is_entry else line  # JSON that is itself the answer


def _sample(entry: Any, where: str) -> Sample:
    if isinstance(entry, str):
        return Sample(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ConfigError(f"{where}: must be a text, or an object with `text`")
    tools = entry.get("tools", TOOLS)
    try:
        names = [tool["function"]["name"] for tool in tools]
    except (TypeError, KeyError):
        names = None
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: `tools` must be a list like a request's")
    return Sample(entry["text"], tools)
