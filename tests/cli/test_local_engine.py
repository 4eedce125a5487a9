"""`jaxserve generate` and `jaxserve chat` with the engine in this process, which here echoes the prompt."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import pytest

import jaxserve.llm  # noqa: F401  # so that it has the real `assemble`, which is replaced below
from jaxserve.assembly import EngineParts
from jaxserve.cli.main import main
from jaxserve.config import EngineConfig
from jaxserve.loading.checkpoint import GenerationDefaults
from tests.scripted import ScriptedClient, saying
from tests.tiny import EOS, byte_tokenizer

RENDERED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> ScriptedClient:
    """The engine that the commands get, whatever model they ask for."""
    client = ScriptedClient(saying([*b"Hello!"]))
    parts = EngineParts(client, byte_tokenizer(), GenerationDefaults(eos_token_ids=(EOS,)))
    monkeypatch.setattr("jaxserve.assembly.assemble", lambda config: parts)
    monkeypatch.setattr("jaxserve.async_llm.assemble", lambda config, check: parts)
    return client


def submitted(client: ScriptedClient) -> list[str]:
    decode = byte_tokenizer().decode
    return [decode(request.prompt_token_ids, skip_special_tokens=False) for request in client.submitted]


def test_generate_takes_texts_as_they_are(client: ScriptedClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "Hi", "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out == "Hello!\n"
    assert submitted(client) == ["Hi"]
    assert client.submitted[0].params.max_tokens == 9


def test_generate_renders_conversations_and_under_chat_texts_too(
    client: ScriptedClient, tmp_path: Path
) -> None:
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    messages = [{"role": "user", "content": "Two"}]
    file.write_text('{"prompt": "One"}\n' + json.dumps({"messages": messages}) + "\n")
    command = ["generate", "m", "--prompts-file", str(file), "--output", str(output)]
    assert main(command) == 0
    assert submitted(client) == ["One", RENDERED.format("Two")]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line.get("prompt") or line["messages"] for line in lines] == ["One", messages]
    assert [line["outputs"][0]["text"] for line in lines] == ["Hello!", "Hello!"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_is_one_line(client: ScriptedClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "Hi", "--output", "/dev/full"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "jaxserve: error: --output /dev/full: No space left on device"
    )


@pytest.mark.parametrize("is_joined", [False, True])
def test_a_host_that_others_have_joined_does_not_wait_for_them_behind_an_error(
    is_joined: bool, client: ScriptedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []

    def end(error: BaseException, *, quietly: bool) -> NoReturn:
        assert not quietly
        ends.append(str(error))
        raise SystemExit

    monkeypatch.setattr("jax.distributed.is_initialized", lambda: is_joined)
    monkeypatch.setattr("jaxserve.engine.hosts.session.end_process", end)
    hosts = ["--nnodes", "2", "-tp", "2", "--master-addr", "here"]
    with pytest.raises(SystemExit) if is_joined else nullcontext():
        assert main(["generate", "m", "--prompt", "Hi" * 200, *hosts]) == 1
    assert len(ends) == is_joined
    assert all("maximum context length" in error for error in ends)


@pytest.mark.parametrize("is_joined", [False, True])
def test_ctrl_c_has_the_same_status_on_one_host_and_on_several(
    is_joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: EngineConfig) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxserve.assembly.assemble", interrupted)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: is_joined)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    monkeypatch.setattr("os._exit", sys.exit)
    hosts = ["--nnodes", "2", "-tp", "2", "--master-addr", "here"]
    if is_joined:
        with pytest.raises(SystemExit, match="130"):
            main(["generate", "m", "--prompt", "Hi", *hosts])
    else:
        assert main(["generate", "m", "--prompt", "Hi", *hosts]) == 130


@pytest.mark.parametrize("is_buffered", [False, True])
@pytest.mark.parametrize("is_joined", [False, True])
def test_output_that_nobody_reads_ends_in_silence_on_one_host_and_on_several(
    is_joined: bool,
    is_buffered: bool,
    client: ScriptedClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As with `jaxserve generate … | head -1`, where there is more of it than a buffer holds."""
    ends: list[int] = []

    def end(status: int) -> NoReturn:
        ends.append(status)
        raise SystemExit

    monkeypatch.setattr("jax.distributed.is_initialized", lambda: is_joined)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    monkeypatch.setattr("os._exit", end)
    hosts = ["--nnodes", "2", "-tp", "2", "--master-addr", "here"]
    reader, writer = os.pipe()
    os.close(reader)
    raw = open(writer, "wb", buffering=-1 if is_buffered else 0)  # noqa: SIM115  # the wrapper closes it
    with io.TextIOWrapper(raw, line_buffering=is_buffered, write_through=not is_buffered) as out:
        monkeypatch.setattr(sys, "stdout", out)
        with suppress(SystemExit):  # in place of the process's end
            assert main(["generate", "m", "--prompt", "Hi", *hosts]) == 1
    assert ends == [1] * is_joined
    assert submitted(client) == ["Hi"]
    assert capsys.readouterr().err == ""
    assert not caplog.records


def test_a_connection_that_breaks_is_told_on_several_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the same error as output that nobody reads."""

    def broken(config: EngineConfig) -> NoReturn:
        raise BrokenPipeError("to another host")

    monkeypatch.setattr("jaxserve.assembly.assemble", broken)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    monkeypatch.setattr("os._exit", sys.exit)
    with (tmp_path / "output").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit, match="1"):
            main(["generate", "m", "--prompt", "Hi", "--nnodes", "2", "-tp", "2", "--master-addr", "here"])
    assert "BrokenPipeError: to another host; this process ends" in caplog.text


def test_generate_under_chat(client: ScriptedClient) -> None:
    assert main(["generate", "m", "--prompt", "Hi", "--chat"]) == 0
    assert submitted(client) == [RENDERED.format("Hi")]


def test_chat(
    client: ScriptedClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert main(["chat", "m", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "Hello!\n"
    assert submitted(client) == [RENDERED.format("Hi")]
