"""The runner on the tiny model: warming up touches every program and nobody's tokens."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine.building import weights_bytes
from jaxserve.engine.compile_cache import CompileCache
from jaxserve.engine.compiling import check_memory, compile_all
from jaxserve.engine.plan import Admission, PlanEntry, StepPlan
from jaxserve.engine.programs import ProgramBook
from jaxserve.engine.runner import Runner
from jaxserve.engine.settle import settle
from jaxserve.errors import ConfigError
from jaxserve.models.parameters import abstract_model, dummy_model
from tests.engine.tiny_engine import TINY, DenseModel, request, tiny_config

PROMPT = (5, 17, 3, 99, 42, 8, 1, 60, 23)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Settings, weights and programs of the tiny engine."""
    config = tiny_config(str(tmp_path_factory.mktemp("xla")), max_num_batched_tokens=16)
    settings = settle(config, TINY, weights_bytes(TINY))
    graphdef, state = dummy_model(TINY, jnp.dtype(settings.dtype), 3)
    _, abstract = abstract_model(TINY, jnp.dtype(settings.dtype))
    book = ProgramBook(settings, graphdef, abstract)
    programs = compile_all(book, CompileCache(None, ""), show_progress=False)
    return settings, book.pack(state), programs, book


def run(runner: Runner, count: int) -> list[int]:
    """Greedy tokens of one request in slot 0, pages 1 to 3; the prompt in one step."""
    entries = [(0, PROMPT), *((len(PROMPT) + i, (-1,)) for i in range(count - 1))]
    tokens = []
    for step, (start, token_ids) in enumerate(entries):
        entry = PlanEntry(
            seq_id=0,
            slot=0,
            start=start,
            token_ids=token_ids,
            samples=True,
            num_generated=step,
            page_offset=0,
            new_pages=(1, 2, 3) if step == 0 else (),
        )
        if step == 0:
            runner.admit(Admission(slot=0, request=request("a", PROMPT), token_ids=PROMPT))
        plan = StepPlan(admissions=(), entries=(entry,))
        tokens += runner.fetch(runner.dispatch(plan)).token_ids[0]
    return tokens


def test_warming_up_runs_every_program_and_changes_no_answer(
    parts: tuple[Any, ...], dense: DenseModel
) -> None:
    settings, weights, programs, book = parts
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return programs[name](*args)

        return call

    runner = Runner(settings, weights, {name: counted(name) for name in programs}, book)
    runner.warm_up()
    assert calls == Counter(programs.keys())
    assert run(runner, 6) == dense.greedy(PROMPT, 6)
    runner.warm_up()
    assert run(runner, 6) == dense.greedy(PROMPT, 6)


def test_too_little_memory_for_a_program_is_said_at_start(parts: tuple[Any, ...]) -> None:
    settings, weights, programs, book = parts

    def out_of_memory(*args: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    runner = Runner(settings, weights, programs | {"forward_mixed_16": out_of_memory}, book)
    with pytest.raises(ConfigError, match="program forward_mixed_16"):
        runner.warm_up()


def test_more_new_pages_than_a_step_has_room_for_go_ahead_of_it(
    parts: tuple[Any, ...], dense: DenseModel
) -> None:
    """A sequence whose prompt is cached but for one token takes all its pages in a decode step."""
    settings, weights, programs, book = parts
    runner = Runner(settings, weights, programs, book)
    (first,) = run(runner, 1)  # leaves the prompt's keys and values in pages 1 and 2
    prompt = (*PROMPT, first)
    runner.admit(Admission(slot=2, request=request("b", prompt), token_ids=prompt))
    entry = PlanEntry(
        seq_id=1,
        slot=2,
        start=len(PROMPT),
        token_ids=(first,),
        samples=True,
        num_generated=0,
        page_offset=0,
        new_pages=(1, 2),
    )
    result = runner.fetch(runner.dispatch(StepPlan(admissions=(), entries=(entry,))))
    assert [first, *result.token_ids[0]] == dense.greedy(PROMPT, 2)


def test_a_program_beyond_the_plan_is_warned_of(
    parts: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    settings, _, programs, _ = parts
    check_memory(programs, settings.memory)
    assert not caplog.records
    memory = replace(settings.memory, available=settings.memory.total, activations=1)
    check_memory(programs, memory)
    (record,) = caplog.records
    assert "memory may run out" in record.getMessage()


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_pages_are_written_in_place(kind: str) -> None:
    config = tiny_config("", max_num_seqs=64, max_num_batched_tokens=64)
    settings = settle(config, TINY, weights_bytes(TINY))
    book = ProgramBook(settings, *abstract_model(TINY, jnp.dtype(settings.dtype)))
    program = next(program for program in book if program.name.startswith(f"forward_{kind}"))
    memory = program.lower().compile().memory_analysis()
    assert memory is not None
    page_bytes = [math.prod(spec.shape) * spec.dtype.itemsize for spec in book.kv_specs]
    assert memory.alias_size_in_bytes >= sum(page_bytes)
    assert memory.temp_size_in_bytes < min(page_bytes) / 2
