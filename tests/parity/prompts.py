"""The thirty-two prompts of the parity checks: one to three hundred tokens, languages, code, chats."""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Either plain text or a conversation that the model's own chat template turns into text."""

    name: str
    content: str | tuple[Message, ...]


def _chat(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """Turns of user and assistant in alternation, the user first."""
    roles = ("user", "assistant")
    turns = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))
    return ({"role": "system", "content": system}, *turns) if system is not None else turns


_HARBOUR = (
    "The harbour town had two clocks, and they had disagreed for as long as anyone could remember. The "
    "one on the customs house ran by the tide tables, and the one on the church ran by the priest, who "
    "wound it after breakfast. Ships left by the first and weddings began by the second. When the new "
    "schoolteacher arrived in March, she measured both against the radio for a month and wrote the "
    "differences in a blue notebook. "
)
_OBSERVATORY = (
    "Log of the mountain observatory, third week. Monday: the dome motor stalled twice in the cold, and "
    "we turned it by hand. Tuesday: clear until two, then thin cirrus; eleven exposures of the variable "
    "star, nine of them good. Wednesday: the wind reached ninety kilometres an hour, so nothing was "
    "opened, and we recalibrated the spectrograph with the neon lamp instead. Thursday: the cook left for"
    " the valley with the supply truck. Friday: the best seeing of the season, 0.6 arc seconds, and the "
    "whole night without a cloud; we finished the programme of the visiting group and began our own "
    "survey of faint galaxies at half past four. Saturday: snow. The road is closed below the second "
    "bend, and the truck with the cook is somewhere on the other side of it. We have flour, beans, "
    "coffee, and a great deal of liquid nitrogen. Sunday: still snow. Everybody has read the only novel "
    "in the house. "
)
_TODO_SOURCE = '''import json
from pathlib import Path


class TodoList:
    """A list of tasks kept in a JSON file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.tasks = json.loads(self.path.read_text()) if self.path.exists() else []

    def add(self, title: str, priority: int = 0) -> None:
        self.tasks.append({"title": title, "priority": priority, "done": False})
        self._save()

    def complete(self, title: str) -> None:
        '''

PROMPTS: tuple[Prompt, ...] = (
    Prompt("one-token", "The"),
    Prompt("one-letter", "x"),
    Prompt("newline", "\n"),
    Prompt("capital", "The capital of France is"),
    Prompt("count", "1, 2, 3, 4, 5, 6, 7,"),
    Prompt("digits", "3.14159265358979"),
    Prompt(
        "repeat",
        "la la la la la la la la la la la la la la la la la la la la la la la la la la la la la la la la",
    ),
    Prompt("spaces", "Name:      Ann\nAge:       41\nCity:      Oslo\nJob:"),
    Prompt("fairy-tale", "Once upon a time, in a small village by the sea, there lived"),
    Prompt("definition", "Photosynthesis is the process by which"),
    Prompt("list", "Five things to pack for a week in the mountains:\n1."),
    Prompt("french", "Il était une fois, dans un petit village de Provence, un boulanger qui"),
    Prompt("german", "Die Geschichte der Stadt beginnt im zwölften Jahrhundert, als"),
    Prompt("spanish", "¿Cuál es la diferencia entre el clima y el tiempo? El clima es"),
    Prompt("russian", "Столица России — Москва. Столица Франции —"),
    Prompt("chinese", "人工智能正在改变我们的生活方式,例如"),
    Prompt("japanese", "昔々、あるところに、おじいさんとおばあさんが"),
    Prompt("emoji", "Weather this week: ☀️ 🌧️ ⛈️ 🌈 and on Sunday 🎉"),
    Prompt("python", "def fibonacci(n: int) -> int:\n    "),
    Prompt(
        "javascript",
        "// Debounce: call fn once, `wait` ms after the last call\nfunction debounce(fn, wait) {\n",
    ),
    Prompt("sql", "SELECT name, COUNT(*) AS orders\nFROM customers\nJOIN orders ON"),
    Prompt("json", '{"id": 17, "name": "Widget", "tags": ["small", "blue"], "price":'),
    Prompt("rust", "/// Returns the greatest common divisor.\nfn gcd(a: u64, b: u64) -> u64 {\n"),
    Prompt("todo-class", _TODO_SOURCE),
    Prompt("story", _HARBOUR),
    Prompt("log", _OBSERVATORY),
    Prompt("chat-capital", _chat("What is the capital of France? Answer in one sentence.")),
    Prompt(
        "chat-system",
        _chat("How do I boil an egg?", system="You are a patient cook. Answer in three short steps."),
    ),
    Prompt(
        "chat-turns",
        _chat(
            "Give me a name for a cat.",
            "How about Biscuit?",
            "And one for a dog, please. Then tell me in two sentences why both names fit.",
        ),
    ),
    Prompt("chat-code", _chat("Write a Python function that reverses a linked list, with a docstring.")),
    Prompt("chat-chinese", _chat("请用三句话介绍一下长城。")),
    Prompt("chat-summary", _chat("Summarise the following notes in one sentence.\n\n" + _OBSERVATORY)),
)
