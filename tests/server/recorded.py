"""Answers recorded from vLLM servers (tests/data/vllm), and scripts that say the same texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from jaxserve.engine.protocol import CoreRequest
from tests.scripted import Script

FOLDER = Path(__file__).parent.parent / "data" / "vllm"
NAMES = sorted(f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.json"))

TOOL_FLAGS: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}

# What the recorded servers were started with, in our words.
SETS: dict[str, dict[str, Any]] = {
    "smollm2": {"served_model_names": ("smollm2",), "max_model_len": 2048},
    "noflag": {"served_model_names": ("smollm2",), "max_model_len": 2048},
    "qwen": {"served_model_names": ("qwen2.5-coder",), "max_model_len": 4096, **TOOL_FLAGS},
    "forced": {"served_model_names": ("qwen2.5-coder",), "max_model_len": 4096, **TOOL_FLAGS},
    "apikey": {
        "served_model_names": ("smollm2",),
        "max_model_len": 2048,
        "max_logprobs": 3,
        "api_keys": ("sk-peer-test",),
        "allowed_origins": ("http://allowed.example",),
        "enable_prompt_tokens_details": True,
        "return_tokens_as_token_ids": True,
    },
}


@dataclass(frozen=True)
class Told:
    """What one choice of an answer says."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()  # names and arguments
    finish_reason: str | None = None
    stop_reason: int | str | None = None


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
    choices: tuple[Told, ...] = field(default=())


@cache
def load(name: str) -> Recording:
    """One recording by its name, "set/name"."""
    data = json.loads((FOLDER / f"{name}.json").read_text())
    request, response = data["request"], data["response"]
    lines = response.get("sse")
    chunks = None
    if lines is not None and request["path"] != "/v1/messages":
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
    answer = response.get("body")
    return Recording(
        name=name,
        set=data["set"],
        method=request["method"],
        path=request["path"],
        headers=request["headers"],
        body=request.get("body"),
        raw_body=request.get("body_raw"),
        status=response["status"],
        answer=answer,
        chunks=chunks,
        choices=tuple(whole(answer) if chunks is None else joined(chunks)),
    )


def whole(answer: Any) -> list[Told]:
    """What the choices of an answer say that was not streamed."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return [
        Told(
            (choice["message"]["content"] or "") if "message" in choice else choice["text"],
            tuple(
                (call["function"]["name"], call["function"]["arguments"])
                for call in choice.get("message", {}).get("tool_calls") or ()
            ),
            choice["finish_reason"],
            choice.get("stop_reason"),
        )
        for choice in choices or ()
    ]


def joined(chunks: Sequence[Any]) -> list[Told]:
    """What the choices of a stream say; checks that calls come in OpenAI's order."""
    choices: dict[int, Told] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            told = choices.get(piece["index"], Told())
            text = (piece["delta"].get("content") or "") if "delta" in piece else piece["text"]
            calls = list(told.calls)
            for call in piece.get("delta", {}).get("tool_calls") or ():
                function = call["function"]
                if "id" in call:
                    assert call["index"] == len(calls)
                    assert call["type"] == "function"
                    calls.append((function["name"], ""))
                else:
                    assert set(call) == {"index", "function"}
                    name, arguments = calls[call["index"]]
                    calls[call["index"]] = (name, arguments + function["arguments"])
            choices[piece["index"]] = Told(
                told.text + text,
                tuple(calls),
                piece["finish_reason"] or told.finish_reason,
                piece.get("stop_reason") or told.stop_reason,
            )
    return [choices[i] for i in sorted(choices)]


def replay(recording: Recording) -> tuple[Script, Any, list[Told]]:
    """A script that makes the engine say the recorded texts, the request, and what its choices are to say.

    A token is a byte here: max_tokens grows to match, and shorter texts that it cut are filled with x.
    """
    choices = list(recording.choices)
    if not choices:
        return (lambda request: list(b"anything")), recording.body, []
    body = dict(recording.body)
    prefix = body["prompt"] if body.get("echo") and isinstance(body.get("prompt"), str) else ""
    texts = [_bytes(_said(recording, choice).removeprefix(prefix)) for choice in choices]
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    if any(choice.finish_reason == "length" for choice in choices) and body[limit] != 0:
        ends = [choice.finish_reason == "stop" for choice in choices]  # an end token needs room, too
        body[limit] = max(len(text) + end for text, end in zip(texts, ends, strict=True))
    elif limit in body and body[limit] != 0:
        body[limit] = max(body[limit], max(map(len, texts)) + 8)
    n = body.get("n", 1)
    answers: list[list[int]] = []
    for i, (choice, text) in enumerate(zip(choices, texts, strict=True)):
        if choice.finish_reason == "length":
            filling = b"x" * (body[limit] - len(text))
            choices[i] = replace(choice, text=choice.text.rstrip("\ufffd") + filling.decode())
            answers.append([*text, *filling, *b"and on"])
        elif choice.stop_reason is None:
            answers.append(list(text))
        else:
            stop = choice.stop_reason
            answers.append([*text, *(stop.encode() if isinstance(stop, str) else [stop]), *b"and on"])

    def script(request: CoreRequest) -> list[int]:
        parts = request.request_id.split("#")[0].split("-")
        return answers[int(parts[-2]) * n + int(parts[-1]) if n > 1 else int(parts[-1])]

    return script, body, choices


def _bytes(text: str) -> bytes:
    """U+FFFD at the end is what the peer makes of half a character."""
    return text.rstrip("\ufffd").encode() + b"\xf0" * text.endswith("\ufffd")


def _said(recording: Recording, choice: Told) -> str:
    """The model's own words: those that it was forced to, else rebuilt in Hermes' form."""
    if recording.name == "qwen/tool-required-cut-stream":  # it tells nothing of what the model said
        recording = load("qwen/tool-required-cut")
        return recording.choices[0].text
    forced = (recording.body.get("structured_outputs") or {}).get("choice", ())
    if len(forced) == 1 and choice.finish_reason != "length":
        return forced[0]
    calls = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in choice.calls
    ]
    return "\n".join([choice.text, *calls] if choice.text else calls)
