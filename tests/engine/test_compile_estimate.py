"""The estimate moves as compiling does."""

from __future__ import annotations

from jaxserve.engine.compile_estimate import compile_seconds

PROGRAMS = ["forward_decode_1", "forward_mixed_64", "sample_greedy_1", "sample_full_logprobs_1", "admit"]


def test_more_work_takes_longer_and_more_processors_less_long() -> None:
    base = compile_seconds(PROGRAMS, "cpu", 30, 2)
    assert compile_seconds([*PROGRAMS, "forward_decode_8"], "cpu", 30, 2) > base
    assert compile_seconds(PROGRAMS, "cpu", 60, 2) > base
    assert base / 2 < compile_seconds(PROGRAMS, "cpu", 30, 4) < base


def test_no_number_of_processors_makes_tracing_and_the_longest_program_shorter() -> None:
    few, many = (compile_seconds(PROGRAMS * 10, "gpu", 32, n) for n in (100, 1000))
    assert few == many > 0
