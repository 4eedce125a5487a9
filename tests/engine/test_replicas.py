"""Several engines side by side, on devices of their own."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from jaxserve.conversion.convert import convert
from jaxserve.engine.replicas import build_replicas
from jaxserve.errors import ConfigError
from tests.conversion.models import write_directory
from tests.engine.tiny_engine import TINY, tiny_config
from tests.pretend_devices import run_on_devices


def test_two_engines_answer_like_a_dense_pass_and_the_second_neither_reads_nor_compiles_again(
    tmp_path: Path,
) -> None:
    convert(str(write_directory(tmp_path / "source")), tmp_path / "converted", progress=False)
    printed = run_on_devices(4, "tests.engine.replicas_on_four_devices", str(tmp_path / "converted"))
    found = json.loads(printed)
    assert found["num_reads"] == 1
    *once, last = found["num_compiles"]
    assert set(once) == {1}
    assert last == 2, "what cannot be loaded is compiled"
    assert found["device"] == "2 engines of 2 x cpu"
    assert found["free"][0] == found["free"][1]


def test_too_few_devices_are_refused_with_what_is_needed() -> None:
    count = len(jax.devices()) + 1
    config = tiny_config("", data_parallel_size=count)
    with pytest.raises(
        ConfigError, match=f"data_parallel_size={count} of tensor_parallel_size=1 need {count} devices"
    ):
        build_replicas(config, None, TINY)
