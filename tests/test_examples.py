"""The examples that need a server, against a scripted one."""

from __future__ import annotations

import asyncio
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from jaxserve.assembly import EngineParts
from jaxserve.cli.engine_flags import engine_config
from jaxserve.cli.main import parse
from jaxserve.cli.server_flags import server_settings
from jaxserve.engine.protocol import CoreRequest
from jaxserve.loading.checkpoint import GenerationDefaults
from tests.bench.fake_server import WORDS, fake_server
from tests.deaf_port import deaf_port
from tests.media.photos import CAT
from tests.scripted import Script, ScriptedClient, saying, scripted_info
from tests.server.serving import PARIS, listening, serving
from tests.tiny import EOS, byte_tokenizer
from tests.vision import TEMPLATE, TOKENS, vision_info

EXAMPLES = Path(__file__).parent.parent / "examples"
CHAT, TOOL_CALLING, VISION = EXAMPLES / "chat.py", EXAMPLES / "tool_calling.py", EXAMPLES / "vision.py"


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


@pytest.mark.parametrize(
    ("arguments", "start_it"),
    [
        ((CHAT,), "make serve"),
        ((TOOL_CALLING,), "see the top of this file"),
        ((VISION, CAT), "jaxserve serve, with a Qwen2-VL or Qwen2.5-VL"),
    ],
)
def test_examples_say_when_nobody_answers(arguments: Sequence[Path], start_it: str) -> None:
    with deaf_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        done = subprocess.run([sys.executable, *arguments, url], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"Nobody answers at {url}: start the server first ({start_it})\n"


async def run_example(
    *arguments: str | Path, stdout: int = asyncio.subprocess.PIPE
) -> tuple[int | None, str, str]:
    """The exit status, stdout and stderr of an example, run while this process serves."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    environment.pop("PYTHONUNBUFFERED", None)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *map(str, arguments),
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    out, err = await process.communicate()
    return process.returncode, (out or b"").decode(), err.decode()


async def test_examples_say_what_is_missing_of_a_url_and_a_key() -> None:
    with serving(api_keys=("secret",)) as served:
        async with listening(served) as url:
            assert await run_example(CHAT, f"{url}/v1") == (
                1,
                "",
                f"The server at {url}/v1 asks for its API key: set OPENAI_API_KEY\n",
            )
    with serving() as served:
        async with listening(served) as url:
            assert await run_example(CHAT, f"{url}/") == (
                1,
                "",
                f"There is no OpenAI API at {url}/: did you mean {url}/v1?\n",
            )
            code, _, err = await run_example(VISION, CAT, f"{url}/v1")
            assert code == 1
            assert re.fullmatch(rf"The server at {url}/v1 refuses: .*image.*\n", err)


def a_weather_model(request: CoreRequest) -> Sequence[int]:
    """Calls where a question is new, and answers from the result where there is one."""
    prompt = bytes(i for i in request.prompt_token_ids if i < 256).decode()
    is_dallas = "Dallas in fahrenheit" in prompt
    if prompt.endswith("Now answer my question in one sentence.\nassistant\n"):
        result = prompt[prompt.rindex("temperature") :]
        return list(f"It is {result[result.index(' ') + 1 : result.index(',')]} degrees.".encode())
    place, unit = ("Dallas", "fahrenheit") if is_dallas else ("San Francisco", "celsius")
    call = f'{{"name": "get_weather", "arguments": {{"location": "{place}", "unit": "{unit}"}}}}'
    return list(f"<tool_call>\n{call}\n</tool_call>".encode())


def a_forgetful_model(request: CoreRequest) -> Sequence[int]:
    """The same, but what the tool says is lost on it."""
    said = bytes(a_weather_model(request))
    return list(said.replace(b"17", b"71"))


async def run_tool_calling(script: Script) -> tuple[int | None, str, str]:
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with serving(script, info={"max_model_len": 4096}, **flags) as served:
        async with listening(served) as url:
            return await run_example(TOOL_CALLING, f"{url}/v1")


def test_kubernetes_starts_servers_with_flags_that_there_are() -> None:
    files = list(yaml.safe_load_all((EXAMPLES / "kubernetes" / "jaxserve.yaml").read_text()))
    kinds = {file["kind"]: file["spec"] for file in files}
    pod = kinds["Deployment"]["template"]["spec"]
    (container,) = pod["containers"]
    command = [*container["command"], *container["args"]]
    args = parse(command[1:])
    assert command[0] == "jaxserve"
    settings = server_settings(args)
    assert settings.port == container["ports"][0]["containerPort"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > settings.shutdown_timeout + sleep
    assert engine_config(args).model == "meta-llama/Llama-3.1-8B-Instruct"
    assert (
        kinds["Service"]["selector"].items() <= kinds["Deployment"]["template"]["metadata"]["labels"].items()
    )


async def test_tool_calling_asks_calls_and_answers() -> None:
    code, out, err = await run_tool_calling(a_weather_model)
    assert (code, err) == (0, "")
    san_francisco = "{'location': 'San Francisco', 'temperature': 17, 'unit': 'celsius', 'sky': 'clear'}"
    dallas = "{'location': 'Dallas', 'temperature': 88, 'unit': 'fahrenheit', 'sky': 'cloudy'}"
    assert out.splitlines() == [
        'required: get_weather {"location": "San Francisco", "unit": "celsius"}',
        f"get_weather gives {san_francisco}",
        "with its result, auto: It is 17 degrees.",
        'by name, streamed: get_weather {"location": "Dallas", "unit": "fahrenheit"}',
        f"get_weather gives {dallas}",
        "with its result, streamed: It is 88 degrees.",
    ]


async def test_tool_calling_fails_where_the_result_is_not_used() -> None:
    code, out, err = await run_tool_calling(a_forgetful_model)
    assert code == 1
    assert "It is 71 degrees." in out
    assert err == "failed: the answer does not use the tool's result\n"


async def test_vision_sends_a_photograph() -> None:
    with serving(info=vision_info(), chat_template=TEMPLATE, special_tokens=TOKENS) as served:
        async with listening(served) as url:
            assert await run_example(VISION, CAT, f"{url}/v1") == (0, f"{PARIS}\n", "")
        (request,) = served.engine.submitted
    assert len(request.images) == 1


@pytest.mark.parametrize("example", [(CHAT,), (VISION, CAT)])
async def test_examples_end_quietly_when_nobody_reads_them(example: Sequence[Path]) -> None:
    """As with `… | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with serving(info=vision_info(), chat_template=TEMPLATE, special_tokens=TOKENS) as served:
        async with listening(served) as url:
            assert await run_example(*example, f"{url}/v1", stdout=writer) == (1, "", "")
    os.close(writer)


@pytest.mark.parametrize("more", [(), ("--model", "m")])
def test_vision_says_that_a_photograph_is_missing(tmp_path: Path, more: tuple[str, ...]) -> None:
    photo = tmp_path / "none.jpg"
    done = subprocess.run([sys.executable, VISION, photo, *more], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"{photo}: No such file or directory\n")


def test_vision_takes_a_pil_image_without_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = ScriptedClient(saying([*b"A cat."]), info=scripted_info(**vision_info()))
    tokenizer = byte_tokenizer(chat_template=TEMPLATE, special=TOKENS)
    parts = EngineParts(client, tokenizer, GenerationDefaults(eos_token_ids=(EOS,)))
    monkeypatch.setattr("jaxserve.llm.assemble", lambda config: parts)
    monkeypatch.setattr(sys, "argv", [str(VISION), str(CAT), "--model", "m"])
    runpy.run_path(str(VISION), run_name="__main__")
    assert capsys.readouterr().out == "A cat.\n"
    assert len(client.submitted[0].images) == 1


def test_vision_says_what_is_wrong_with_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [str(VISION), str(CAT), "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=str(tmp_path)):
        runpy.run_path(str(VISION), run_name="__main__")

    client = ScriptedClient(saying([*b"A cat."]), info=scripted_info())
    parts = EngineParts(client, byte_tokenizer(chat_template=TEMPLATE, special=TOKENS), GenerationDefaults())
    monkeypatch.setattr("jaxserve.llm.assemble", lambda config: parts)
    with pytest.raises(SystemExit, match="image"):
        runpy.run_path(str(VISION), run_name="__main__")
    assert capsys.readouterr().out == ""
