"""The conversation of `jaxserve chat`: lines in, streamed answers out, and a few / commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TextIO

from jaxserve.cli.chat_backends import ChatBackend, Message
from jaxserve.errors import JaxserveError

HELP = """\
/system TEXT   set the system prompt (without TEXT: remove it) and start over
/clear         forget the conversation
/help          this list
/exit          leave (so does Ctrl-D)
Ctrl-C stops an answer."""


class ChatLoop:
    """One conversation with `backend`.  A line is a message, unless it starts with `/`."""

    def __init__(
        self,
        backend: ChatBackend,
        *,
        system: str | None = None,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self._backend = backend
        self._system = system
        self._history: list[Message] = []
        self._out = out or sys.stdout
        self._err = err or sys.stderr

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, the system prompt first."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return system + self._history

    def run_terminal(self) -> int:
        """Talk to a person until Ctrl-D or /exit."""
        self._note(f"{self._backend.name}: type a message, /help for help")
        for line in _typed_lines(self._note):
            if line.startswith("/"):
                if not self._command(line):
                    break
            elif line:
                self._answer(line)
        return 0

    def run_pipe(self, stdin: TextIO) -> int:
        """Answer each line of `stdin`; returns 1 if an answer failed."""
        status = 0
        for raw in stdin:
            line = raw.strip()
            if line.startswith("/"):
                if not self._command(line):
                    break
            elif line and not self._answer(line):
                status = 1
        return status

    def _answer(self, text: str) -> bool:
        """Print the answer as it comes.  Returns whether there was one."""
        self._history.append({"role": "user", "content": text})
        pieces: list[str] = []

        def write(piece: str) -> None:
            if piece:
                pieces.append(piece)
                self._out.write(piece)
                self._out.flush()

        stopped = False
        try:
            self._backend.answer(self.messages, write)
        except KeyboardInterrupt:
            stopped = True
        except JaxserveError as error:
            if pieces:
                self._out.write("\n")
            self._history.pop()  # an unanswered question would put two user turns in a row
            self._note(f"error: {error}")
            return False
        self._out.write("\n")
        self._out.flush()
        if stopped:
            self._note("(stopped)")
        if pieces:
            self._history.append({"role": "assistant", "content": "".join(pieces)})
        else:
            self._history.pop()
        return True

    def _command(self, line: str) -> bool:
        """Carry out a / command; False when it means to leave."""
        name, _, rest = line.partition(" ")
        match name:
            case "/exit" | "/quit":
                return False
            case "/help":
                self._note(HELP)
            case "/clear":
                self._history.clear()
                self._note("(forgotten)")
            case "/system":
                self._system = rest.strip() or None
                self._history.clear()
                self._note("(system prompt set)" if self._system else "(no system prompt)")
            case _:
                self._note(f"{name} is not a command; /help lists them")
        return True

    def _note(self, text: str) -> None:
        """Say something that is no part of the answers: on stderr, so that a pipe carries answers only."""
        print(text, file=self._err, flush=True)


def _typed_lines(note) -> Iterator[str]:
    try:
        import readline  # noqa: F401 - importing it gives input() line editing and history
    except ImportError:
        pass
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /exit leaves)")
