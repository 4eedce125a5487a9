"""Stop strings found in text as it comes, holding back what may be the beginning of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopChecker:
    """Watches one answer for stop strings.

    The answer stops where a stop string is first complete; of several complete at the same character the
    longest counts.  That depends on the text alone, never on the pieces it comes in.  A stop string complete
    within the first `min_tokens` tokens is ordinary text (as in vLLM, one that ends later still stops).

    One automaton for all stop strings, so that a character costs the same however many and long they are.
    """

    def __init__(self, stop: Sequence[str], include_stop_str: bool = False, min_tokens: int = 0) -> None:
        self._automaton = _Automaton(stop)
        self._node = _ROOT  # the longest beginning of a stop string that the text ends with
        self._include_stop_str = include_stop_str
        self._num_free_tokens = min_tokens  # tokens still to come whose text cannot complete a stop string
        self._held = ""
        self._is_stopped = False

    def push(self, text: str, num_tokens: int = 1) -> tuple[str, str | None]:
        """Take the text of `num_tokens` more tokens; the text to give out, and the stop string completed.

        Under `min_tokens` push one token at a time, even if its text is empty: it matters which token
        completes a stop string.  After a stop string nothing more is to be pushed.
        """
        assert not self._is_stopped, "the answer has already stopped"
        is_free = self._num_free_tokens > 0
        self._num_free_tokens -= num_tokens
        window = self._held + text
        for position, character in enumerate(text, len(self._held) + 1):
            self._node, pattern = self._automaton.step(self._node, character)
            if pattern is not None and not is_free:
                self._is_stopped, self._held = True, ""
                end = position if self._include_stop_str else position - len(pattern)
                return window[:end], pattern
        num_held = 0 if self._include_stop_str else self._automaton.depths[self._node]
        cut = len(window) - num_held
        self._held = window[cut:]
        return window[:cut], None

    def flush(self) -> str:
        """The text held back, once it is sure that nothing follows."""
        held, self._held = self._held, ""
        return held


_ROOT = 0


class _Automaton:
    """Aho and Corasick's: a tree of the strings' beginnings, each linked to the longest other one that it ends with.

    (A. V. Aho, M. J. Corasick: Efficient string matching, 1975.)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depths = [0]  # characters of each node's beginning
        self._children: list[dict[str, int]] = [{}]
        self._complete: list[str | None] = [None]  # the longest string that a node ends with
        for string in strings:
            node = _ROOT
            for character in string:
                node = self._children[node].get(character) or self._add(node, character)
            self._complete[node] = string
        self._shorter = [_ROOT] * len(self.depths)
        nodes = deque(self._children[_ROOT].values())
        while nodes:  # by depth, so that shorter beginnings are done
            node = nodes.popleft()
            for character, child in self._children[node].items():
                self._shorter[child] = self._next(self._shorter[node], character)
                nodes.append(child)
            self._complete[node] = self._complete[node] or self._complete[self._shorter[node]]

    def step(self, node: int, character: str) -> tuple[int, str | None]:
        """The node after one more character, and the longest string that it completes."""
        node = self._next(node, character)
        complete = self._complete[node]
        while node and not self._children[node]:  # nothing can follow a whole string: only its end counts on
            node = self._shorter[node]
        return node, complete

    def _next(self, node: int, character: str) -> int:
        while node and character not in self._children[node]:
            node = self._shorter[node]
        return self._children[node].get(character, _ROOT)

    def _add(self, node: int, character: str) -> int:
        child = self._children[node][character] = len(self.depths)
        self.depths.append(self.depths[node] + 1)
        self._children.append({})
        self._complete.append(None)
        return child
