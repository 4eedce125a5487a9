"""Conversions from every kind of source, and everything that can stand in their way."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.config import Dtype
from jaxserve.conversion import convert as convert_module
from jaxserve.conversion import sources
from jaxserve.conversion.convert import convert
from jaxserve.conversion.destination import Destination
from jaxserve.errors import CheckpointError
from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
from jaxserve.loading.orbax_format import JOURNAL, MANIFEST, STATE
from jaxserve.loading.resolve import open_checkpoint, open_config
from jaxserve.text.tokenizer import load_tokenizer
from tests.conversion.models import assert_same, parameters_of, write_directory
from tests.loading.builders import gguf_shapes, random_tensors, write_gguf
from tests.models.golden import NAMES
from tests.tiny import CHAT_TEMPLATE


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even tiny parameters."""
    monkeypatch.setattr(sources, "LEAST_CHUNK_BYTES", 64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "source")


def convert_quietly(
    source: Path, destination: Path, dtype: Dtype | None = None, *, overwrite: bool = False
) -> None:
    convert(str(source), destination, dtype=dtype, overwrite=overwrite, progress=False)


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize("golden", NAMES)
def test_every_family_comes_back_bit_for_bit(golden: str, tmp_path: Path) -> None:
    source, converted = write_directory(tmp_path / "source", golden), tmp_path / "converted"
    convert_quietly(source, converted)
    original, checkpoint = open_checkpoint(str(source)), open_checkpoint(str(converted))
    assert isinstance(checkpoint, OrbaxCheckpoint)
    assert (checkpoint.config, checkpoint.defaults) == (original.config, original.defaults)
    assert {layout.dtype for layout in checkpoint.layouts.values()} == {"float16"}  # as it was stored
    assert any(np.prod(layout.grid) > 1 for layout in checkpoint.layouts.values())
    for dtype in ("float32", "bfloat16"):
        assert_same(parameters_of(converted, dtype), parameters_of(source, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_float_type_may_be_chosen(dtype: Dtype, source: Path, tmp_path: Path) -> None:
    convert_quietly(source, tmp_path / "converted", dtype)
    checkpoint = OrbaxCheckpoint(tmp_path / "converted")
    assert {layout.dtype for layout in checkpoint.layouts.values()} == {dtype}
    assert_same(parameters_of(tmp_path / "converted", dtype), parameters_of(source, dtype))


def test_float_types_that_differ_are_kept(source: Path, tmp_path: Path) -> None:
    """Norms in float32 and two kinds of projections, as some checkpoints have them."""
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].astype(np.float32) * np.float32(1.1)
        elif "q_proj" in name:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    save_file(tensors, source / "model.safetensors")
    convert_quietly(source, tmp_path / "converted")
    layouts = OrbaxCheckpoint(tmp_path / "converted").layouts
    assert layouts["norm.scale"].dtype == "float32"
    assert layouts["layers.0.attention.qkv"].dtype == "float32"  # bfloat16 and float16 both fit into that
    assert layouts["layers.0.mlp.down"].dtype == "float16"
    assert_same(parameters_of(tmp_path / "converted"), parameters_of(source))


def test_the_texts_are_those_of_the_source(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").write_text("as you like")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "model.safetensors.index.json").write_text("{}")
    convert_quietly(source, tmp_path / "converted")
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE")
    for name in names:
        assert (tmp_path / "converted" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "converted" / "model.safetensors.index.json").exists()
    assert load_tokenizer(tmp_path / "converted").chat_templates == {
        "default": CHAT_TEMPLATE,
        "tool_use": "tools",
    }


@pytest.mark.parametrize("biases", [False, True])
def test_a_gguf_file(biases: bool, tmp_path: Path) -> None:
    architecture = "qwen2" if biases else "llama"
    write_gguf(tmp_path / "m.gguf", random_tensors(gguf_shapes(biases=biases)), architecture)
    converted = tmp_path / "converted"
    convert_quietly(tmp_path / "m.gguf", converted)
    assert open_config(str(converted))[:2] == open_config(str(tmp_path / "m.gguf"))[:2]
    assert_same(parameters_of(converted), parameters_of(tmp_path / "m.gguf"))
    original, copy = load_tokenizer(tmp_path / "m.gguf"), load_tokenizer(converted)
    assert copy.get_vocab() == original.get_vocab()
    assert copy.special_tokens == original.special_tokens


def test_the_tokenizer_may_come_from_elsewhere(source: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_tensors(gguf_shapes()))
    convert(str(tmp_path / "m.gguf"), tmp_path / "converted", tokenizer=str(source), progress=False)
    assert load_tokenizer(tmp_path / "converted").chat_template == CHAT_TEMPLATE
    assert open_config(str(tmp_path / "converted"))[:2] == open_config(str(tmp_path / "m.gguf"))[:2]
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"source: no tokenizer\.json"):
        convert_quietly(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    convert(str(source), tmp_path / "other", tokenizer=str(tmp_path / "m.gguf"), progress=False)
    assert open_config(str(tmp_path / "other"))[:2] == open_config(str(source))[:2]
    assert load_tokenizer(tmp_path / "other").get_vocab() == load_tokenizer(tmp_path / "m.gguf").get_vocab()


@pytest.mark.usefixtures("cut_small")
def test_a_converted_checkpoint_may_be_converted_again(source: Path, tmp_path: Path) -> None:
    convert_quietly(source, tmp_path / "once", "float32")
    convert_quietly(tmp_path / "once", tmp_path / "twice", "bfloat16")
    assert_same(parameters_of(tmp_path / "twice", "bfloat16"), parameters_of(source, "bfloat16"))
    with pytest.raises(CheckpointError, match="once: is what is to be converted"):
        convert_quietly(tmp_path / "once", tmp_path / "once", "bfloat16", overwrite=True)


def test_what_does_not_fit_its_config_is_not_converted(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"needs are missing \(1\): model\.norm\.weight"):
        convert_quietly(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


class TestDestination:
    """What may be there already."""

    def test_a_whole_checkpoint_is_replaced_only_if_told_so(self, source: Path, tmp_path: Path) -> None:
        converted = tmp_path / "converted"
        convert_quietly(source, converted)
        before = (converted / MANIFEST).read_bytes()
        with pytest.raises(CheckpointError, match="converted: holds a converted checkpoint; --overwrite"):
            convert_quietly(source, converted, "bfloat16")
        assert (converted / MANIFEST).read_bytes() == before
        other = write_directory(tmp_path / "other", "qwen3")
        (other / "additional.txt").write_text("only here")
        convert_quietly(other, converted, overwrite=True)
        assert_same(parameters_of(converted), parameters_of(other))
        convert_quietly(source, converted, overwrite=True)
        assert not (converted / "additional.txt").exists()
        assert_same(parameters_of(converted), parameters_of(source))

    def test_a_damaged_one_can_be_replaced_too(self, source: Path, tmp_path: Path) -> None:
        convert_quietly(source, tmp_path / "converted")
        (tmp_path / "converted" / MANIFEST).write_text("{")
        convert_quietly(source, tmp_path / "converted", overwrite=True)
        assert_same(parameters_of(tmp_path / "converted"), parameters_of(source))

    def test_other_files_are_left_alone(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        for number in range(4):
            (tmp_path / "mine" / f"thesis{number}.txt").write_text("years of work")
        with pytest.raises(CheckpointError, match=r"holds other files \(thesis0\.txt, .*thesis2\.txt, …\)"):
            convert_quietly(source, tmp_path / "mine", overwrite=True)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is a file; give a directory"):
            convert_quietly(source, source / "model.safetensors")
        with pytest.raises(CheckpointError, match="source: holds other files"):
            convert_quietly(source, source, overwrite=True)

    def test_an_empty_directory_will_do_and_parents_are_made(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "volume" / "lost+found").mkdir(parents=True)
        convert_quietly(source, tmp_path / "volume")
        convert_quietly(source, tmp_path / "a" / "b" / "c")
        assert_same(parameters_of(tmp_path / "a" / "b" / "c"), parameters_of(tmp_path / "volume"))

    def test_nothing_is_downloaded_for_a_place_that_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").touch()
        with pytest.raises(CheckpointError, match="holds other files"):
            convert("owner/name", tmp_path / "taken", progress=False)

    def test_a_full_disk_is_known_before_anything_is_touched(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        convert_quietly(source, tmp_path / "converted")
        usage = namedtuple("usage", "total used free")  # as shutil's own
        monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5))
        with pytest.raises(CheckpointError, match=r"new: 0\.00 GB are to be written, and 0\.00 GB are free"):
            convert_quietly(source, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        with pytest.raises(CheckpointError, match="are free"):
            convert_quietly(source, tmp_path / "converted", "float32", overwrite=True)
        parameters_of(tmp_path / "converted")

    def test_a_place_that_cannot_be_written(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"cannot be written: Not a directory"):
            convert_quietly(source, source / "config.json" / "converted")
        if os.geteuid():  # root may write everywhere
            (tmp_path / "locked").mkdir(0o500)
            with pytest.raises(CheckpointError, match=r"Permission denied; give a directory that you may"):
                convert_quietly(source, tmp_path / "locked" / "converted")

    def test_two_at_once(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = Destination.commit

        def convert_meanwhile(self: Destination) -> None:
            with pytest.raises(CheckpointError, match="another process is converting into it"):
                convert_quietly(source, tmp_path / "converted")
            honest(self)

        monkeypatch.setattr(Destination, "commit", convert_meanwhile)
        convert_quietly(source, tmp_path / "converted")


class TestUnfinished:
    """What a conversion leaves that did not come to its end.  See test_killed, too."""

    @pytest.fixture
    def unfinished(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A conversion that failed when half of its parameters were written."""
        honest, numbers = Destination.note, itertools.count()  # which several threads may ask

        def note(self: Destination, name: str, checksums: tuple[int, ...]) -> None:
            if next(numbers) >= 7:
                raise OSError(28, "No space left on device", str(self.directory))
            honest(self, name, checksums)

        with monkeypatch.context() as patch:
            patch.setattr(Destination, "note", note)
            message = (
                r"converted: cannot be written: No space left on device; free some space and run it again"
            )
            with pytest.raises(CheckpointError, match=message):
                convert_quietly(source, tmp_path / "converted")
        return tmp_path / "converted"

    def test_is_never_loaded(self, unfinished: Path) -> None:
        for load_format in ("auto", "orbax", "safetensors"):
            with pytest.raises(CheckpointError, match="converted: holds a conversion that is not finished"):
                open_checkpoint(str(unfinished), load_format)
        with pytest.raises(CheckpointError, match="not finished"):
            open_config(str(unfinished))

    def test_goes_on_where_it_ended(
        self, unfinished: Path, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = [json.loads(line)["parameter"] for line in (unfinished / JOURNAL).read_text().splitlines()[2:]]
        assert len(done) == 7
        torn = (unfinished / JOURNAL).read_text() + '{"parameter": "lay'
        (unfinished / JOURNAL).write_text(torn)
        written: list[str] = []
        honest = Destination.note

        def note(self: Destination, name: str, checksums: tuple[int, ...]) -> None:
            written.append(name)
            honest(self, name, checksums)

        monkeypatch.setattr(Destination, "note", note)
        convert_quietly(source, unfinished)
        assert not set(written) & set(done)
        assert len(written) + len(done) == len(OrbaxCheckpoint(unfinished).layouts)
        assert not (unfinished / JOURNAL).exists()
        assert_same(parameters_of(unfinished), parameters_of(source))

    def test_a_parameter_that_is_no_longer_whole_is_written_again(
        self, unfinished: Path, source: Path
    ) -> None:
        name = json.loads((unfinished / JOURNAL).read_text().splitlines()[2])["parameter"]
        next((unfinished / STATE / name).glob("c.*")).write_bytes(b"")
        convert_quietly(source, unfinished)
        assert_same(parameters_of(unfinished), parameters_of(source))

    @pytest.mark.parametrize("what", ["dtype", "source", "empty journal", "damaged journal"])
    def test_another_conversion_begins_anew(self, what: str, unfinished: Path, source: Path) -> None:
        dtype: Dtype | None = None
        if what == "dtype":
            dtype = "bfloat16"
        elif what == "source":
            tensors = load_file(source / "model.safetensors")
            save_file({name: -tensor for name, tensor in tensors.items()}, source / "model.safetensors")
        else:
            (unfinished / JOURNAL).write_text("" if what == "empty journal" else '{"a": 1}\n{"b": 2}\n[3]\n')
        convert_quietly(source, unfinished, dtype)
        expected = parameters_of(source, dtype or "float32")
        assert_same(parameters_of(unfinished, dtype or "float32"), expected)


def test_a_write_that_fails(source: Path, tmp_path: Path) -> None:
    """For real: the system refuses files of more than 4 KB, which config.json and the chunks keep below."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from jaxserve.conversion.convert import convert\n"
        "from jaxserve.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "try: convert(sys.argv[1], Path(sys.argv[2]), dtype='float32', progress=False)\n"
        "except CheckpointError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "converted")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert "cannot be written: File too large; what was written is kept" in done.stdout
    with pytest.raises(CheckpointError, match="not finished"):
        open_checkpoint(str(tmp_path / "converted"))
    convert_quietly(source, tmp_path / "converted", "float32")
    assert_same(parameters_of(tmp_path / "converted"), parameters_of(source))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="tells peak memory on Linux alone")
def test_memory_stays_under_twice_the_largest_tensor(tmp_path: Path) -> None:
    """130 MB of weights of which none has more than 8 MB; beside these, buffers and what is imported meanwhile."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.conversion.large import convert_large\n"
        "print(convert_large(Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < 2 * 8e6 + 40e6
