"""`jaxserve chat` against a scripted server and a scripted backend."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from jaxserve.cli.chat_backends import Message
from jaxserve.cli.chat_loop import ChatLoop
from jaxserve.cli.main import main
from jaxserve.errors import JaxserveError
from tests.bench.fake_server import WORDS, FakeServer
from tests.deaf_port import deaf_port

ANSWER = "".join(WORDS)


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put text into a piped stdin."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_piped_lines_are_a_conversation(
    server: FakeServer, type_in: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    type_in("Which city?\n\nAnd the river?\n")
    assert main(["chat", "--url", server.url, "--system", "Be brief.", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"
    system = {"role": "system", "content": "Be brief."}
    first = {"role": "user", "content": "Which city?"}
    answer = {"role": "assistant", "content": ANSWER}
    assert [body["messages"] for body in server.bodies] == [
        [system, first],
        [system, first, answer, {"role": "user", "content": "And the river?"}],
    ]
    assert server.bodies[0]["model"] == "fake"  # the first that the server lists
    assert server.bodies[0]["temperature"] == 0
    assert server.bodies[0]["max_tokens"] == 1024
    assert "top_p" not in server.bodies[0]


def test_commands(
    server: FakeServer, type_in: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    type_in("one\n/clear\ntwo\n/system Be kind.\nthree\n/help\n/what\n/exit\nfour\n")
    assert main(["chat", "--url", f"{server.url}/v1", "--api-key", "secret"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{ANSWER}\n" * 3  # nothing but answers in a pipe
    assert "/system TEXT" in captured.err
    assert "/what is not a command" in captured.err
    assert [[m["content"] for m in body["messages"]] for body in server.bodies] == [
        ["one"],
        ["two"],
        ["Be kind.", "three"],
    ]
    assert all("authorization: bearer secret" in head for head in server.headers)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("refuses", "the server answered 400: temperature must be in [0, 2]"),
        ("plain-error", "the server answered 502: bad gateway"),
        ("breaks", "the engine died"),
        ("no-done", "the server ended the stream early"),
    ],
)
def test_an_answer_that_fails(
    server: FakeServer,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    model: str,
    message: str,
) -> None:
    type_in("one\ntwo\n")
    assert main(["chat", model, "--url", server.url]) == 1
    assert f"error: {message}" in capsys.readouterr().err
    # A question without an answer is no part of the conversation.
    assert [len(body["messages"]) for body in server.bodies] == [1, 1]


def test_nobody_listens(type_in: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    type_in("one\n")
    with deaf_port() as port:
        url = f"http://127.0.0.1:{port}"
        assert main(["chat", "--url", url]) == 1
    assert f"no answer from {url}" in capsys.readouterr().err


class Scripted:
    """A backend that says `pieces`, then raises `error`."""

    name = "scripted"

    def __init__(self, pieces: list[str], error: BaseException | None = None) -> None:
        self.pieces = pieces
        self.error = error
        self.asked: list[list[Message]] = []

    def answer(self, messages: list[Message], write: Callable[[str], None]) -> None:
        self.asked.append(list(messages))
        for piece in self.pieces:
            write(piece)
        if self.error is not None:
            raise self.error

    def close(self) -> None: ...


def test_ctrl_c_keeps_what_was_said() -> None:
    backend, out, err = Scripted(["Once", " upon"], KeyboardInterrupt()), io.StringIO(), io.StringIO()
    loop = ChatLoop(backend, out=out, err=err)
    assert loop.run_pipe(io.StringIO("Tell me\nGo on\n")) == 0
    assert out.getvalue() == "Once upon\n" * 2
    assert "(stopped)" in err.getvalue()
    assert [m["content"] for m in backend.asked[1]] == ["Tell me", "Once upon", "Go on"]


def test_an_error_after_some_text_starts_a_new_line() -> None:
    out, err = io.StringIO(), io.StringIO()
    loop = ChatLoop(Scripted(["Once"], JaxserveError("gone")), out=out, err=err)
    assert loop.run_pipe(io.StringIO("Tell me\n")) == 1
    assert out.getvalue() == "Once\n"
    assert loop.messages == []


def test_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter(["hello", KeyboardInterrupt(), "", "again", EOFError()])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        line = next(script)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    backend, out, err = Scripted(["Hi."]), io.StringIO(), io.StringIO()
    assert ChatLoop(backend, out=out, err=err).run_terminal() == 0
    assert out.getvalue() == "Hi.\nHi.\n"
    assert [m["content"] for m in backend.asked[1]] == ["hello", "Hi.", "again"]
    assert "Ctrl-D or /exit leaves" in err.getvalue()
