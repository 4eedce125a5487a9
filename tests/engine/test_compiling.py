"""Which program is compiled when: those that can use what another one tunes come after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxserve.engine.compile_cache import CompileCache
from jaxserve.engine.compiling import compile_all
from jaxserve.engine.programs import Program
from tests.patience import PATIENCE

ADD = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), np.float32))


class Recorder(CompileCache):
    """Compiles nothing, and notes what begins and ends."""

    def __init__(self, during: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(None, "")
        self.events: list[tuple[str, str]] = []
        self.rows: dict[str, int] = {}
        self._during = during
        self._compiled = ADD.compile()

    def compile(
        self, name: str, lower: Callable[[], jax.stages.Lowered], rows: int = 0
    ) -> jax.stages.Compiled:
        self.events.append(("begin", name))
        self.rows[name] = rows
        self._during(name)
        self.events.append(("end", name))
        return self._compiled


def program(name: str, products: str = "", rows: int = 0) -> Program:
    return Program(name, lambda: ADD, rows, products)


def test_one_of_those_with_the_same_products_comes_first() -> None:
    cache = Recorder(lambda name: time.sleep(0.01))
    names = [f"{kind}{i}" for kind in "ab" for i in range(4)]
    found = compile_all([program(name, name[0]) for name in names], cache, show_progress=False)
    assert sorted(found) == names
    for kind in "ab":
        ended = cache.events.index(("end", f"{kind}0"))
        assert all(cache.events.index(("begin", f"{kind}{i}")) > ended for i in range(1, 4))


def test_those_without_wait_for_nobody() -> None:
    together = threading.Barrier(2, timeout=PATIENCE)

    def meet(name: str) -> None:
        together.wait()

    cache = Recorder(meet)
    assert sorted(compile_all([program("a"), program("b")], cache, show_progress=False)) == ["a", "b"]


def test_how_many_rows_a_program_has_reaches_its_compiler() -> None:
    cache = Recorder()
    compile_all([program("a", rows=512), program("b")], cache, show_progress=False)
    assert cache.rows == {"a": 512, "b": 0}


def test_nothing_new_is_begun_once_it_was_given_up() -> None:
    given_up = threading.Event()
    cache = Recorder(lambda name: given_up.set())
    assert not compile_all(
        [program(f"a{i}", "a") for i in range(4)], cache, show_progress=False, given_up=given_up
    )
    assert cache.events == [("begin", "a0"), ("end", "a0")]


def test_an_error_of_one_is_the_error_of_all() -> None:
    def fail(name: str) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError, match="a0"):
        compile_all([program("a0", "a"), program("a1", "a")], Recorder(fail), show_progress=False)
