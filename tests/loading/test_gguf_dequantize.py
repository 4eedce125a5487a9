"""Dequantising gives, to the bit, what the gguf package gives."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxserve.loading import gguf_dequantize
from jaxserve.loading.gguf_dequantize import can_dequantize, dequantize
from tests.loading.builders import random_blocks

FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
BLOCKS = [kind for kind in Kind if can_dequantize(kind) and kind not in FLOATS]


def test_the_usual_block_types_are_among_those_tested() -> None:
    names = {kind.name for kind in BLOCKS}
    assert names >= {
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "MXFP4",
    }


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_in_chunks_are_as_the_gguf_package_reads_them(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = random_blocks((5, 768), kind)  # 768 weights a row: chunks of 1024 end within rows
    expected = gguf.dequantize(raw, kind)
    monkeypatch.setattr(gguf_dequantize, "_CHUNK_WEIGHTS", 1024)
    got = dequantize(raw.reshape(-1), kind)
    assert got.dtype == np.float32
    assert np.array_equal(got, expected.reshape(-1))
    assert np.any(got != 0)


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_floats_are_views_in_their_own_type(kind: Kind) -> None:
    raw = random_blocks((3, 64), kind)
    got = dequantize(raw.reshape(-1), kind)
    assert np.shares_memory(got, raw)
    assert np.array_equal(got.astype(np.float32), gguf.dequantize(raw, kind).reshape(-1))


@pytest.mark.parametrize(
    "kind", [Kind.I8, Kind.I32, Kind.F64, Kind.Q8_1, Kind.Q8_K], ids=lambda kind: kind.name
)
def test_what_is_no_weight_type_is_not_claimed(kind: Kind) -> None:
    assert not can_dequantize(kind)
