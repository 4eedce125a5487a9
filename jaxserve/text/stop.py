"""Stop strings found in text as it comes, holding back what may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Watches one answer for stop strings.

    The answer stops where a stop string is first complete; of several complete at the same character the
    longest counts.  That depends on the text alone, never on the pieces it comes in.  A stop string complete
    within the first `min_tokens` tokens is ordinary text (as in vLLM, one that ends later still stops).

    One Knuth-Morris-Pratt automaton a stop string, so a character costs the same however long they are.
    """

    def __init__(self, stop: Sequence[str], include_stop_str: bool = False, min_tokens: int = 0) -> None:
        self._automata = [
            (pattern, _failure_table(pattern)) for pattern in sorted(stop, key=len, reverse=True)
        ]
        self._matched = [0] * len(self._automata)  # characters of each stop string that the text ends with
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
            pattern = self._step(character)
            if pattern is not None and not is_free:
                self._is_stopped, self._held = True, ""
                end = position if self._include_stop_str else position - len(pattern)
                return window[:end], pattern
        num_held = 0 if self._include_stop_str else max(self._matched, default=0)
        cut = len(window) - num_held
        self._held = window[cut:]
        return window[:cut], None

    def flush(self) -> str:
        """The text held back, once it is sure that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Move every automaton over one character; the longest stop string that it completes."""
        complete = None
        for i, (pattern, failure) in enumerate(self._automata):
            state = self._matched[i]
            while state and pattern[state] != character:
                state = failure[state]
            if pattern[state] == character:
                state += 1
            if state == len(pattern):
                complete = complete or pattern
                state = failure[state]
            self._matched[i] = state
        return complete


def _failure_table(pattern: str) -> list[int]:
    """failure[n]: length of the longest proper prefix of `pattern` that its first n characters end with."""
    failure = [0, 0]
    for n in range(1, len(pattern)):
        state = failure[n]
        while state and pattern[state] != pattern[n]:
            state = failure[state]
        failure.append(state + 1 if pattern[state] == pattern[n] else 0)
    return failure
