"""What a user may call a model, and what each name opens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jaxserve.config import LoadFormat
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading import resolve
from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint
from jaxserve.loading.resolve import locate_tokenizer, open_checkpoint, open_config
from jaxserve.loading.safetensors_checkpoint import SafetensorsCheckpoint
from tests.loading.builders import (
    HF_CONFIG,
    gguf_shapes,
    hf_shapes,
    random_tensors,
    write_gguf,
    write_hf_directory,
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, **options: object) -> str:
        pytest.fail(f"the hub was asked for {model}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(resolve, "fetch_model", lambda name: pytest.fail(f"{name} was fetched"))


@pytest.fixture
def hf_directory(tmp_path: Path) -> Path:
    write_hf_directory(tmp_path / "hf", random_tensors(hf_shapes()))
    return tmp_path / "hf"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "m.gguf", random_tensors(gguf_shapes()))
    return tmp_path / "gguf" / "m.gguf"


def test_a_directory_of_safetensors(hf_directory: Path) -> None:
    for load_format in ("auto", "safetensors"):
        checkpoint = open_checkpoint(str(hf_directory), load_format)
        assert isinstance(checkpoint, SafetensorsCheckpoint)
        assert checkpoint.path == hf_directory


def test_a_gguf_file_and_a_directory_with_one(gguf_file: Path) -> None:
    for model in (gguf_file, gguf_file.parent):
        for load_format in ("auto", "gguf"):
            checkpoint = open_checkpoint(str(model), load_format)
            assert isinstance(checkpoint, GGUFCheckpoint)
            assert checkpoint.path == gguf_file


def test_a_directory_with_both_is_what_the_format_says(hf_directory: Path, gguf_file: Path) -> None:
    gguf_file.rename(hf_directory / "m.gguf")
    assert isinstance(open_checkpoint(str(hf_directory)), SafetensorsCheckpoint)
    assert isinstance(open_checkpoint(str(hf_directory), "gguf"), GGUFCheckpoint)


def test_home_is_understood(hf_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(hf_directory.parent))
    assert open_checkpoint("~/hf").path == hf_directory


def test_several_gguf_files(gguf_file: Path) -> None:
    (gguf_file.parent / "n.gguf").write_bytes(gguf_file.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 \.gguf files; give one of them: m\.gguf, n\.gguf"):
        open_checkpoint(str(gguf_file.parent))


@pytest.mark.parametrize(
    ("load_format", "error", "message"),
    [
        ("gguf", CheckpointError, r"hf: holds no \.gguf file"),
        ("dummy", ConfigError, "no checkpoint to open"),
    ],
)
def test_formats_that_do_not_fit_a_directory(
    hf_directory: Path, load_format: LoadFormat, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(str(hf_directory), load_format)


def test_safetensors_asked_of_a_gguf_file(gguf_file: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory in Hugging Face layout"):
        open_checkpoint(str(gguf_file), "safetensors")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.bin: neither a directory nor a \.gguf file"):
        open_checkpoint(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("model", ["/nowhere/at/all", "nonsense", "./x/y", "a/b/c"])
def test_what_is_neither_a_path_nor_a_hub_name(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such path, and neither a hub name.* smollm2"):
        open_checkpoint(model)


def test_a_missing_gguf_file_is_not_sought_on_the_hub() -> None:
    with pytest.raises(CheckpointError, match=r"models/missing\.gguf: no such file"):
        open_checkpoint("models/missing.gguf")


def test_a_hub_name_is_downloaded_without_pickles_and_code(
    hf_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(
        model: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        files = [
            "config.json",
            "model-00001-of-00002.safetensors",
            "tokenizer.json",
            "pytorch_model.bin",
            "x.py",
        ]
        files += ["chat_template.jinja", "tokenizer.model", "onnx/model.safetensors", "original/params.json"]
        chosen = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        calls.append((model, revision, set(chosen)))
        return str(hf_directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("owner/name-1.5B").path == hf_directory
    assert open_config("owner/name-1.5B", "v2")[2] == hf_directory
    config_files = {"config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model"}
    assert calls == [
        ("owner/name-1.5B", None, config_files | {"model-00001-of-00002.safetensors"}),
        ("owner/name-1.5B", "v2", config_files),
    ]


ANSWER = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RepositoryNotFoundError("404", response=cast(Any, ANSWER)),
            "neither a path here nor a model on the hub",
        ),
        (RevisionNotFoundError("404", response=cast(Any, ANSWER)), "has no revision 'v2' on the hub"),
        (
            GatedRepoError("403", response=cast(Any, ANSWER)),
            "gated on the hub; accept its terms there and set HF_TOKEN",
        ),
        (
            HfHubHTTPError("503 busy", response=cast(Any, ANSWER)),
            "downloading it from the hub failed: .*503 busy",
        ),
        (LocalEntryNotFoundError("no such"), "not in the hub's local cache, and the hub cannot be reached"),
        (OSError(28, "No space left on device"), "failed: OSError: .*No space left on device"),
        (HFValidationError("bad name"), "neither a path here nor a valid hub name: bad name"),
    ],
)
def test_errors_of_the_hub_name_the_model(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(model: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=f"owner/name: .*{message}"):
        open_checkpoint("owner/name", revision="v2")


def test_without_network_the_cache_of_the_hub_is_used(hf_directory: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE and HF_HOME when imported."""
    repository = tmp_path / "home" / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    hf_directory.rename(repository / "snapshots" / "abc")
    code = (
        "from jaxserve.errors import CheckpointError\n"
        "from jaxserve.loading.resolve import open_checkpoint\n"
        "print(open_checkpoint('owner/name').path.name)\n"
        "try: open_checkpoint('owner/other')\n"
        "except CheckpointError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == "abc"
    assert second.startswith("owner/other: no such path here, not in the hub's local cache")


def test_short_names_are_fetched_unless_a_path_is_called_so(
    gguf_file: Path, hf_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "fetch_model", lambda name: {"smollm2": gguf_file}[name])
    assert open_checkpoint("smollm2").path == gguf_file
    assert open_config("smollm2")[2] == gguf_file
    monkeypatch.chdir(hf_directory.parent)
    hf_directory.rename("smollm2")
    assert isinstance(open_checkpoint("smollm2"), SafetensorsCheckpoint)


def test_a_revision_is_of_a_model_on_the_hub(hf_directory: Path) -> None:
    for model in (str(hf_directory), "smollm2", "/nowhere"):
        with pytest.raises(ConfigError, match=r"revision='v2': .* is not a model on the hub"):
            open_checkpoint(model, revision="v2")


def test_config_alone_is_enough_for_open_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    config, defaults, path = open_config(str(tmp_path))
    assert (config.family, config.num_layers) == ("llama", 2)
    assert defaults.eos_token_ids == (2,)
    assert path == tmp_path


def test_open_config_of_a_gguf_file(gguf_file: Path) -> None:
    assert open_config(str(gguf_file)) == open_config(str(gguf_file.parent))
    config, _, path = open_config(str(gguf_file))
    assert config == open_checkpoint(str(gguf_file)).config
    assert path == gguf_file


def test_tokenizers_are_found_where_models_are(
    gguf_file: Path, hf_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate_tokenizer(str(gguf_file)) == gguf_file
    assert locate_tokenizer(str(gguf_file.parent)) == gguf_file
    (gguf_file.parent / "tokenizer.json").write_text("{}")
    assert locate_tokenizer(str(gguf_file.parent)) == gguf_file.parent
    assert locate_tokenizer(str(hf_directory)) == hf_directory
    monkeypatch.setattr(resolve, "fetch_model", lambda name: {"smollm2": gguf_file}[name])
    assert locate_tokenizer("smollm2") == gguf_file
    with pytest.raises(CheckpointError, match="nowhere: no such path"):
        locate_tokenizer("nowhere")


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.gguf file and no config\.json"):
        open_config(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(str(tmp_path))
