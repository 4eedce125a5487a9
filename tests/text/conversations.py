"""Random conversations in which everything that is said is told by a mark of its own, to look for in a prompt."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any


class Marked:
    """One conversation: its messages, and the marks that must come out (`m000`, `m001`, …)."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self.marks: list[str] = []
        self.messages: list[dict[str, Any]] = []
        roles = self._pick([], ["system"], ["developer"], ["system", "system"], ["system", "developer"])
        for role in roles:
            self._say(role)
        for _ in range(self._random.randint(1, 3)):
            self._say("user")
            if self._random.random() < 0.2:
                self._say(self._pick("system", "developer"))
            for _ in range(self._random.randint(0, 2)):
                self._call()
            if self._random.random() < 0.2:
                return  # the results wait for an answer
            self._say("assistant")
        self._say("user")

    def _pick(self, *choices: Any) -> Any:
        return self._random.choice(choices)

    def _mark(self) -> str:
        mark = f"m{next(self._numbers):03}"
        self.marks.append(mark)
        return mark

    def _content(self) -> Any:
        if self._random.random() < 0.7:
            return self._mark()
        return [{"type": "text", "text": self._mark()} for _ in range(self._pick(1, 2))]

    def _say(self, role: str, **more: Any) -> None:
        self.messages.append({"role": role, "content": self._content(), **more})

    def _call(self) -> None:
        """Calls, with text or without, and their results in some order."""
        calls = []
        for _ in range(self._pick(1, 1, 2, 3)):
            arguments = {self._mark(): self._mark(), "n": [1, self._mark()]}
            function = {"name": self._mark(), "arguments": self._pick(arguments, json.dumps(arguments))}
            call_id = f"chatcmpl-tool-{self._random.getrandbits(64):016x}"
            calls.append({"id": call_id, "type": "function", "function": function})
        if self._random.random() < 0.5:
            self._say("assistant", tool_calls=calls)
        else:
            self.messages.append({"role": "assistant", "content": self._pick(None, ""), "tool_calls": calls})
        ids = [call["id"] for call in calls]
        if self._random.random() < 0.3:
            self._random.shuffle(ids)
        for call_id in ids:
            self._say("tool", tool_call_id=call_id)
