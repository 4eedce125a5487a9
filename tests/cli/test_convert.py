"""`jaxserve convert`, and commands that take what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from jaxserve import progress
from jaxserve.cli.main import main
from tests.conversion.models import assert_same, parameters_of, write_directory
from tests.loading.builders import finish, gguf_shapes, gguf_writer, random_blocks


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_directory(tmp_path / "source"))


def test_says_what_it_wrote(
    source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    converted = tmp_path / "converted"
    assert main(["convert", source, str(converted), "--dtype", "bfloat16"]) == 0
    out, err = capfd.readouterr()
    assert out == f"{converted}: llama, 0 million parameters, 0.00 GB of bfloat16\n"
    assert "Converting weights: " in err
    assert_same(parameters_of(converted, "bfloat16"), parameters_of(Path(source), "bfloat16"))


def test_quantised_weights_become_float32_and_it_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = gguf_writer(tmp_path / "m.gguf")
    for name, shape in gguf_shapes().items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            writer.add_tensor(
                name, random_blocks(shape, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
            )
    finish(writer)
    for dtype, told in (("auto", True), ("bfloat16", False)):
        converted = tmp_path / dtype
        assert main(["convert", str(tmp_path / "m.gguf"), str(converted), "--dtype", dtype]) == 0
        out, err = capfd.readouterr()
        assert out.endswith("float32\n" if told else "bfloat16\n")
        assert ("--dtype bfloat16 would take half of that" in err) is told
        expected = parameters_of(tmp_path / "m.gguf", "bfloat16")
        assert_same(parameters_of(converted, "bfloat16"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "{dst}"], "/nowhere: no such path"),
        (["{src}", "{src}/config.json"], "config.json: is a file"),
        (["{src}", "{src}", "--overwrite"], "source: holds other files"),
        (["{src}", "{dst}", "--tokenizer", "/nowhere"], "/nowhere: no such path"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(src=source, dst=tmp_path / "dst") for argument in arguments]
    assert main(["convert", *filled]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxserve.conversion.convert._write_parameters", interrupt)
    assert main(["convert", source, str(tmp_path / "converted")]) == 130
    assert "what was written is kept, run it again to go on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["plan", str(tmp_path / "converted")]) == 1
    assert "holds a conversion that is not finished" in capsys.readouterr().err


def test_plan_of_a_converted_model(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted = tmp_path / "converted"
    assert main(["convert", source, str(converted)]) == 0
    capsys.readouterr()
    flags = ("--json", "--max-model-len", "32", "--max-num-seqs", "4", "--kv-cache-memory", "1M")
    assert main(["plan", str(converted), "--dtype", "float32", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["family"], plan["path"]) == ("llama", str(converted))
    weights = parameters_of(converted).values()
    assert plan["memory"]["weights"] == sum(value.nbytes for value in weights)


def test_transformers_cannot_be_a_peer(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["convert", source, str(tmp_path / "converted")]) == 0
    monkeypatch.setattr("jaxserve.bench.throughput.check_transformers", lambda python: None)
    assert main(["bench", "throughput", str(tmp_path / "converted"), "--vs", "transformers"]) == 2
    assert "transformers cannot read; give the original" in capsys.readouterr().err
