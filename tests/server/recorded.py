"""Answers recorded from a vLLM server (tests/data/vllm), and a script that says the same texts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.engine.protocol import CoreRequest
from tests.scripted import Script

FOLDER = Path(__file__).parent.parent / "data" / "vllm"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@dataclass(frozen=True)
class Recording:
    """One request and its answer."""

    name: str
    set: str
    method: str
    path: str
    headers: dict[str, str]
    body: Any  # None: no body, or one that is no JSON
    raw_body: str | None
    status: int
    answer: Any  # JSON of an answer that is not streamed
    chunks: list[Any] | None  # JSON of a streamed one's events

    @property
    def choices(self) -> list[dict[str, Any]]:
        """Per choice: text, finish_reason, stop_reason; a stream is joined."""
        if self.chunks is None:
            found = (self.answer or {}).get("choices") or []
            return [
                {
                    "text": c["message"]["content"] if "message" in c else c["text"],
                    "finish_reason": c["finish_reason"],
                    "stop_reason": c.get("stop_reason"),
                }
                for c in found
            ]
        return joined(self.chunks)


def joined(chunks: Sequence[Any]) -> list[dict[str, Any]]:
    """Per choice of a stream: text, finish_reason, stop_reason."""
    choices: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"text": "", "finish_reason": None, "stop_reason": None}
    )
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = choices[piece["index"]]
            choice["text"] += (piece["delta"].get("content") or "") if "delta" in piece else piece["text"]
            choice["finish_reason"] = piece["finish_reason"] or choice["finish_reason"]
            choice["stop_reason"] = piece.get("stop_reason") or choice["stop_reason"]
    return [choices[i] for i in sorted(choices)]


def load(name: str) -> Recording:
    """One recording by name."""
    data = json.loads((FOLDER / f"{name}.json").read_text())
    request, response = data["request"], data["response"]
    lines = response.get("sse")
    chunks = None
    if lines is not None:
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
    return Recording(
        name=name,
        set=data["set"],
        method=request["method"],
        path=request["path"],
        headers=request["headers"],
        body=request.get("body"),
        raw_body=request.get("body_raw"),
        status=response["status"],
        answer=response.get("body"),
        chunks=chunks,
    )


def replay(recording: Recording) -> tuple[Script, Any, list[dict[str, Any]]]:
    """A script that makes the engine give the recorded texts, the request, and the choices to expect.

    A token is a byte here: max_tokens grows to match, and shorter texts that it cut are filled with x.
    """
    choices = [dict(choice) for choice in recording.choices]
    if not choices:
        return (lambda request: list(b"anything")), recording.body, []
    body = dict(recording.body)
    prefix = body["prompt"] if body.get("echo") and "prompt" in body else ""
    texts = [choice["text"].removeprefix(prefix).encode() for choice in choices]
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    if any(choice["finish_reason"] == "length" for choice in choices) and body[limit] != 0:
        ends = [choice["finish_reason"] == "stop" for choice in choices]  # an end token needs room, too
        body[limit] = max(len(text) + end for text, end in zip(texts, ends, strict=True))
    elif limit in body and body[limit] != 0:
        body[limit] = max(body[limit], max(map(len, texts)) + 8)
    n = body.get("n", 1)
    answers: list[list[int]] = []
    for choice, text in zip(choices, texts, strict=True):
        if choice["finish_reason"] == "length":
            filling = b"x" * (body[limit] - len(text))
            choice["text"] += filling.decode()
            answers.append([*text, *filling, *b"and on"])
        elif choice["stop_reason"] is None:
            answers.append(list(text))
        else:
            stop = choice["stop_reason"]
            answers.append([*text, *(stop.encode() if isinstance(stop, str) else [stop]), *b"and on"])

    def script(request: CoreRequest) -> list[int]:
        parts = request.request_id.split("#")[0].split("-")
        return answers[int(parts[-2]) * n + int(parts[-1]) if n > 1 else int(parts[-1])]

    return script, body, choices
