"""Flags that vLLM has and we do not: refused, or taken with a word, and never passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.cli.engine_flags import engine_config
from jaxserve.cli.main import build_parser, main, parse
from jaxserve.cli.server_flags import server_settings
from jaxserve.cli.vllm_flags import NEEDLESS, environment_note, told
from jaxserve.cli.vllm_server_options import SERVER_OPTIONS
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.vllm_options import ENGINE_OPTIONS, VllmOption

OPTIONS = [(flag, option) for option in (*ENGINE_OPTIONS, *SERVER_OPTIONS) for flag in option.flags]


@pytest.fixture(scope="module")
def known() -> set[str]:
    return set(build_parser()[1]["serve"]._option_string_actions)


def test_every_one_is_told_of() -> None:
    for is_needless in (False, True):
        some = [(flag, option) for flag, option in OPTIONS if option.is_needless == is_needless]
        argv = [
            word for flag, option in some for word in ([flag] if option.is_switch else [flag, "something"])
        ]
        said = [
            option.sentence(flag if option.is_switch else f"{flag} something")
            for flag, option in some
            if not option.asks_for_nothing(True if option.is_switch else "something")
        ]
        if is_needless:
            assert told(parse(["serve", "m", *argv]), NEEDLESS) == said
        else:
            with pytest.raises(ConfigError) as caught:
                parse(["serve", "m", *argv])
            assert str(caught.value).split("\n  ") == ["this cannot be:", *said]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("--quantization", "awq"), "--quantization awq: not supported; weights run in --dtype"),
        (("--enable-lora",), "--enable-lora: not supported; LoRA adapters"),
        (("--quantization.x=4",), "--quantization.x 4: not supported; weights run in --dtype"),
        (("--limit-mm-per-prompt.image", "4"), "give --limit-mm-per-prompt the whole JSON object"),
    ],
)
def test_a_refusal_is_one_line(argv: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: error: --")
    assert error in err
    assert err.count("\n") == 1


def test_all_that_is_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "--enable-lora", "--zzz", "-pp", "2"]) == 2
    said = [line.split(": ")[0].strip() for line in capsys.readouterr().err.splitlines()]
    assert said == ["jaxserve", "--enable-lora", "-pp 2", "unknown arguments"]


@pytest.mark.parametrize(
    "argv",
    [
        ("--tensor_parallel_size", "1"),
        ("--pipeline-parallel-size=1",),
        ("--quantization", "None"),
        ("--tokenizer-mode", "auto"),
        ("--no-enable-lora", "--no-enforce-eager", "--enable-chunked-prefill", "--async-scheduling"),
        ("--scheduling-policy", "priority", "--runner", "generate"),
    ],
)
def test_what_asks_for_nothing_passes(argv: tuple[str, ...]) -> None:
    args = parse(["serve", *argv, "m"])
    assert engine_config(args) == EngineConfig(model="m")
    assert told(args, NEEDLESS) == []


def test_what_changes_nothing_is_taken_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--enforce-eager", "/no/such/model", "-O3", "-cc.mode=2", "--no-enable-chunked-prefill"]
    assert main(["plan", *argv]) == 1
    *notes, error = capsys.readouterr().err.splitlines()
    assert [note.split("; ")[0] for note in notes] == [
        f"jaxserve: {said}: has no effect"
        for said in ("--enforce-eager", "-O 3", "--no-enable-chunked-prefill", "-cc.mode 2")
    ]
    assert error.startswith("jaxserve: error: /no/such/model: no such path")


def test_in_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("enforce_eager: true\nenable-lora: false\nno-async-scheduling: true\nswap-space: 4\n")
    notes = told(parse(["serve", "m", "--config", str(path), "--use-v2-block-manager"]), NEEDLESS)
    said = [
        f"{path}: {said}" for said in ("enforce_eager: True", "no-async-scheduling: True", "swap-space: 4")
    ]
    assert [note.split(": has")[0] for note in notes] == [*said, "--use-v2-block-manager"]


def test_no_flag_is_in_two_places(known: set[str]) -> None:
    flags = [flag for flag, _ in OPTIONS]
    assert len(flags) == len(set(flags))
    assert set(flags) <= known


@pytest.mark.parametrize("option", [*ENGINE_OPTIONS, *SERVER_OPTIONS], ids=lambda option: option.flags[0])
def test_a_reason_speaks_of_flags_that_there_are(option: VllmOption, known: set[str]) -> None:
    others = {flag for flag, _ in OPTIONS}
    named = {word.strip("();,") for word in option.why.split() if word.startswith(("--", "(--"))}
    assert named <= known - others


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment_note() is None
    monkeypatch.setenv("VLLM_API_KEY", "from-there")
    assert environment_note() is None
    assert server_settings(parse(["serve", "m"])).api_keys == ("from-there",)
    assert server_settings(parse(["serve", "m", "--api-key", "mine"])).api_keys == ("mine",)
    monkeypatch.setenv("VLLM_USE_V1", "1")
    assert environment_note() == "not read: VLLM_USE_V1; flags say everything"
