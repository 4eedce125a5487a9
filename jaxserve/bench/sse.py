"""Server-sent events from bytes: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

DONE = b"[DONE]"  # the last event of an OpenAI stream


class SseParser:
    """Collects bytes, however they are cut, into the `data` of whole events."""

    def __init__(self) -> None:
        self._pending = b""  # the start of a line that has not ended
        self._data: list[bytes] = []  # data lines of the event that has not ended

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that `chunk` completes.

        Lines end with \\n or \\r\\n; a lone \\r, which the standard allows too, is sent by no server.
        """
        events: list[bytes] = []
        lines = (self._pending + chunk).split(b"\n")
        self._pending = lines.pop()
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            # Comments (":"), ids, event names and retry times do not matter to an OpenAI client.
        return events
