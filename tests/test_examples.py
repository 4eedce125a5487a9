"""The examples that need a server, against a scripted one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from jaxserve.bench.server_process import free_port
from tests.bench.fake_server import WORDS, fake_server

CHAT = Path(__file__).parent.parent / "examples" / "chat.py"


def test_chat_prints_the_plain_and_the_streamed_answer() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    with fake_server() as server:
        done = subprocess.run(
            [sys.executable, CHAT, f"{server.url}/v1"],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    assert done.stderr == ""
    assert done.stdout == f"{''.join(WORDS)}\n" * 2
    plain, streamed = server.bodies
    assert plain["messages"] == streamed["messages"]
    assert plain["messages"][0]["content"] == "What is the capital of France? Answer in one sentence."
    assert (plain["temperature"], streamed["temperature"]) == (0, 0)


def test_chat_says_when_nobody_answers() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    done = subprocess.run([sys.executable, CHAT, url], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"Nobody answers at {url}: start the server first (make serve)\n"
