"""--config FILE.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.cli.engine_flags import engine_config
from jaxserve.cli.main import main, parse
from jaxserve.cli.server_flags import server_settings


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_keys_are_flags(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        model: org/name
        max-model-len: 8K
        max_num_seqs: 16
        kv-cache-memory: 2G
        gpu-memory-utilization: 0.8
        enable-prefix-caching: false
        forbid-recompile: true
        served-model-name: [a, b]
        api-key: only
        allowed-origins: ["https://x.org"]
        disable-log-requests: true
        tensor-parallel-size: 1
        seed: null
        """,
    )
    args = parse(["serve", "--config", path])
    config, settings = engine_config(args), server_settings(args)
    assert config.model == "org/name"
    assert (config.max_model_len, config.max_num_seqs, config.kv_cache_memory) == (8192, 16, 2**31)
    assert (config.gpu_memory_utilization, config.enable_prefix_caching) == (0.8, False)
    assert config.forbid_recompile
    assert config.seed is None
    assert settings.served_model_names == ("a", "b")
    assert settings.api_keys == ("only",)
    assert settings.allowed_origins == ("https://x.org",)
    assert not settings.log_requests


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\nmax-num-seqs: 16\nenable-prefix-caching: false\n")
    args = parse(["serve", "b", f"--config={path}", "--max-num-seqs", "8", "--enable-prefix-caching"])
    config = engine_config(args)
    assert (config.model, config.max_num_seqs, config.enable_prefix_caching) == ("b", 8, True)
    assert engine_config(parse(["serve", "--model", "c", "--config", path])).model == "c"


def test_negative_names_are_taken_as_they_say(tmp_path: Path) -> None:
    path = write(tmp_path, "no-enable-prefix-caching: true\n")
    assert not engine_config(parse(["plan", "m", "--config", path])).enable_prefix_caching
    path = write(tmp_path, "disable-log-requests: false\n")
    assert server_settings(parse(["serve", "m", "--config", path])).log_requests
    path = write(tmp_path, "enable-log-requests: false\n")
    assert not server_settings(parse(["serve", "m", "--config", path])).log_requests


def test_subcommands_of_bench_read_it_too(tmp_path: Path) -> None:
    path = write(tmp_path, "num-prompts: 7\nendpoint: chat\nrequest-rate: 2.5\nbatch-size: 4")
    assert main(["bench", "serve", "--config", path]) == 2  # bench serve has no batch size
    path = write(tmp_path, "num-prompts: 7\nendpoint: chat\nrequest-rate: 2.5\n")
    args = parse(["bench", "serve", "--config", path])
    assert (args.num_prompts, args.endpoint, args.request_rate) == (7, "chat", 2.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max-num-sequences: 3",
            "'max-num-sequences' is not a flag of this command; did you mean 'max-num-seqs'",
        ),
        ("max-model-len: many", "max-model-len: 'many' is not a count"),
        ("dtype: int8", "dtype: 'int8' must be one of"),
        ("port: eighty", "port: 'eighty' is not valid"),
        ("forbid-recompile: 1", "forbid-recompile: 1 must be true or false"),
        ("lora-modules: a=b", "lora-modules: a=b: not supported"),
        ("tool-call-parser: hermse", "tool_call_parser='hermse': there is no such parser; use one of "),
        ("enable-auto-tool-choice: true", "enable_auto_tool_choice=True: needs tool_call_parser"),
        ("config: other.yaml", "'config' is not a flag"),
        ("- a\n- b", "must hold `flag: value` lines, not a list"),
        ("a: [", "not YAML"),
    ],
)
def test_faults_are_named(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", "--config", write(tmp_path, text)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "--config", "/nowhere.yaml"]) == 2
    assert "--config /nowhere.yaml: No such file" in capsys.readouterr().err


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert engine_config(parse(["plan", "m", "--config", write(tmp_path, "")])).model == "m"
