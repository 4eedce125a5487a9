"""The command line: what it builds, what it refuses, how it says so."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve import __version__
from jaxserve.cli.engine_flags import engine_argv, engine_config
from jaxserve.cli.main import build_parser, main, parse
from jaxserve.cli.server_flags import server_settings
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.server.settings import ServerSettings
from tests.conversion.models import write_directory

ENGINE_COMMANDS = ("serve", "chat", "generate", "plan", "bench latency", "bench throughput")


@pytest.mark.parametrize("command", ENGINE_COMMANDS)
def test_every_engine_command_builds_the_same_config(command: str) -> None:
    args = parse(
        [
            *command.split(),
            *("org/name", "--tokenizer", "tok", "--load-format", "dummy", "--dtype", "bfloat16"),
            *("--max-model-len", "8K", "--block-size", "32", "--max-num-seqs", "64"),
            *("--max-num-batched-tokens", "2k", "--gpu-memory-utilization", "0.5", "--kv-cache-memory", "2G"),
            *("--no-enable-prefix-caching", "--forbid-recompile", "--compile-cache-dir", "", "--seed", "3"),
            *("--max-logprobs", "5", "--max-num-queued-reqs", "100"),
            *("--max-queued-image-bytes", "3G"),
        ]
    )
    assert engine_config(args) == EngineConfig(
        model="org/name",
        tokenizer="tok",
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=8192,
        page_size=32,
        max_num_seqs=64,
        max_num_batched_tokens=2000,
        gpu_memory_utilization=0.5,
        kv_cache_memory=2 * 2**30,
        enable_prefix_caching=False,
        forbid_recompile=True,
        compile_cache_dir="",
        seed=3,
        max_logprobs=5,
        max_num_queued_reqs=100,
        max_queued_image_bytes=3 * 2**30,
    )


@pytest.mark.parametrize("command", ENGINE_COMMANDS)
def test_without_flags_the_config_has_its_own_defaults(command: str) -> None:
    assert engine_config(parse([*command.split(), "m"])) == EngineConfig(model="m")
    assert engine_config(parse([*command.split(), "--model", "m", "--dtype", "auto"])) == EngineConfig(
        model="m"
    )


def test_engine_argv_is_the_way_back() -> None:
    config = EngineConfig(
        model="m",
        dtype="float16",
        kv_cache_dtype="fp8_e5m2",
        max_model_len=100,
        tensor_parallel_size=4,
        enable_expert_parallel=True,
        enable_prefix_caching=False,
        forbid_recompile=True,
        seed=0,
        generation_config="vllm",
        override_generation_config={"temperature": 0.6, "max_new_tokens": 7},
        limit_mm_per_prompt={"image": 4},
        mm_processor_kwargs={"max_pixels": 1003520},
        allowed_media_domains=("a.example.com", "*"),
        allowed_local_media_path="/data",
    )
    assert engine_config(parse(["serve", "m", *engine_argv(config)])) == config
    assert engine_argv(EngineConfig(model="m")) == []


def test_every_field_of_engine_config_but_one_has_a_flag() -> None:
    options = build_parser()[1]["serve"]._option_string_actions
    missing = [
        field.name
        for field in dataclasses.fields(EngineConfig)
        if "--" + field.name.replace("_", "-") not in options
    ]
    assert missing == []


def test_without_server_flags_the_settings_have_their_own_defaults() -> None:
    assert server_settings(parse(["serve", "m"])) == ServerSettings()


def test_server_flags(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    args = parse(
        [
            *("serve", "m", "--host", "0.0.0.0", "--port", "0", "--served-model-name", "a", "b"),
            *("--api-key", "k1", "k2", "--root-path", "/llm", "--allowed-origins", '["https://x.org"]'),
            *(
                "--shutdown-timeout",
                "5",
                "--max-body-bytes",
                "1M",
                "--max-total-body-bytes",
                "3G",
                "--strict-params",
                "--disable-log-requests",
            ),
            *(
                "--enable-prompt-tokens-details",
                "--return-tokens-as-token-ids",
                "--trust-request-chat-template",
                "--enable-force-include-usage",
                "--disable-access-log-for-endpoints",
                "/health, /metrics",
            ),
            *("--metrics-prefix", "vllm:", "--chat-template", str(template)),
            *("--chat-template-content-format", "openai", "--ssl-keyfile", "k", "--ssl-certfile", "c"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
        ]
    )
    assert server_settings(args) == ServerSettings(
        host="0.0.0.0",
        port=0,
        served_model_names=("a", "b"),
        api_keys=("k1", "k2"),
        root_path="/llm",
        allowed_origins=("https://x.org",),
        shutdown_timeout=5,
        max_body_bytes=2**20,
        max_total_body_bytes=3 * 2**30,
        strict_params=True,
        log_requests=False,
        enable_prompt_tokens_details=True,
        return_tokens_as_token_ids=True,
        enable_force_include_usage=True,
        unlogged_paths=("/health", "/metrics"),
        trust_request_chat_template=True,
        metrics_prefix="vllm:",
        chat_template="{{ messages }}",
        chat_template_content_format="openai",
        ssl_keyfile="k",
        ssl_certfile="c",
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    )


@pytest.mark.parametrize("flag", ["--tool-call-parser", "--reasoning-parser"])
def test_an_unknown_parser_stops_the_start(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/such/model", flag, "hermse"]) == 2
    err = capsys.readouterr().err
    assert "'hermse'" in err
    assert ("hermes" if "tool" in flag else "qwen3") in err


def test_a_chat_template_may_stand_on_the_command_line() -> None:
    args = parse(["serve", "m", "--chat-template", "{{ messages }}"])
    assert server_settings(args).chat_template == "{{ messages }}"
    for given, wrong in (
        ("none.jinja", r"--chat-template none\.jinja: no such file, and no template of ours"),
        ("{% for %}", r"--chat-template \{% for %\}: chat_template is not valid jinja2"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            server_settings(parse(["serve", "m", "--chat-template", given]))


def test_a_name_of_no_template_of_the_model_is_told_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxserve.engine.replicas.build_replicas", lambda *_: pytest.fail("too late"))
    model = str(write_directory(tmp_path / "model"))
    assert main(["serve", model, "--port", "0", "--chat-template", "tool_use"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "jaxserve: error: chat_template 'tool_use' is neither jinja2 nor the name of a template of the model "
        "(it has: default)."
    )


def test_a_template_of_the_model_that_is_none_is_told_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxserve.engine.replicas.build_replicas", lambda *_: pytest.fail("too late"))
    model = write_directory(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for %}")
    assert main(["serve", str(model), "--port", "0"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("jaxserve: error: chat_template is not valid jinja2: ")


def test_kv_pages_have_the_types_that_vllm_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_config(parse(["serve", "m", "--kv-cache-dtype", "fp8"])).kv_cache_dtype == "fp8"
    with pytest.raises(SystemExit):
        parse(["serve", "m", "--kv-cache-dtype", "fp8_inc"])
    assert "--kv-cache-dtype: invalid choice: 'fp8_inc'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan"], "MODEL is missing"),
        (["chat"], "or --url of a running server"),
        (["plan", "m", "--node-rank", "1"], "with nnodes=1; say how many hosts there are with that"),
        (["plan", "m", "--page-size", "12"], "page_size=12"),
        (
            ["plan", "m", "--max-num-seq", "3"],
            "unknown arguments: --max-num-seq (did you mean --max-num-seqs?), 3",
        ),
        (["chat", "m", "--url", "http://x", "--dtype", "float32"], "--dtype: has no effect with --url"),
        (["chat", "m", "--api-key", "x"], "--api-key: has no effect without --url"),
        (["serve", "a", "--model", "b"], "two models"),
        (["bench", "serve", "--random-range-ratio", "1"], "--random-range-ratio 1.0"),
        (["bench", "serve", "--base-url", "ftp://x"], "is not a URL"),
        (["generate", "m", "--prompt", "a", "--temperature", "3"], "temperature must be in [0, 2], got 3.0"),
        (["generate", "m", "--prompts-file", "/nowhere.txt"], "--prompts-file /nowhere.txt: No such file"),
        (["plan", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_errors_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["serve", "m", "--max-model-len", "many"], ["nonsense"], []])
def test_usage_errors_end_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"jaxserve {__version__}\n"


@pytest.mark.parametrize("argv", [["plan", "m", "--json"], ["--version"]])
def test_output_that_nobody_reads_is_no_error_even_at_exit(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with `jaxserve … | head`, where it is as short as a buffer, and is written when all is done."""
    monkeypatch.setattr("jaxserve.cli.plan.make_plan", lambda config: {"model": config.model})
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(argv) == 1
    assert capsys.readouterr().err == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from jaxserve.cli.main import main\n"
        "try: main(['bench', 'serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'transformers', 'quart', 'httpx', 'pydantic', 'yaml', 'rich', 'asyncio'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-concurrency" in done.stdout


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"jaxserve {__version__}\n"
