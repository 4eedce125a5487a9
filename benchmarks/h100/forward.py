"""`python -m benchmarks.h100.forward --model 1b --shapes decode:1,decode:8@1`: single programs, by settings of XLA.

Times forward passes (KIND:TOKENS, or KIND:TOKENS@ROWS with fewer rows in use) and greedy samplers (sample:ROWS) alone,
without an engine around them, so that a few programs are compiled instead of all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.h100.compile_time import CHOICES
from benchmarks.h100.engine import SETTINGS
from benchmarks.h100.models import TEXT_MODELS, write_model
from benchmarks.h100.options import add_engine_options
from benchmarks.h100.peer import floor_ms
from benchmarks.h100.tables import print_table
from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.batch import new_pages, pack
from jaxserve.engine.building import weights_bytes
from jaxserve.engine.lattice import ForwardShape
from jaxserve.engine.plan import PlanEntry, StepPlan
from jaxserve.engine.programs import ProgramBook
from jaxserve.engine.sampler_programs import state_to_tuple
from jaxserve.engine.sampler_state import init_state
from jaxserve.engine.sampling_rows import NUM_FLOATS, NUM_INTS, fill_padding
from jaxserve.engine.settle import Settings, settle
from jaxserve.engine.xla_options import compiler_options
from jaxserve.loading.resolve import open_config
from jaxserve.models.parameters import abstract_model, dummy_model

_SECONDS = 1.0  # of calls timed in a row, about: a GPU slows down when it runs hot
_REPEATS = 5


@dataclass(frozen=True)
class Case:
    """One program, and how many of its rows are in use."""

    kind: str
    size: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.size}" + (f"@{self.rows}" if self.rows != self.size else "")


class Bench:
    """Weights, pages and programs of one model."""

    def __init__(self, model: str, context: int, overrides: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_model(model, Path(folder))
            # Less than the engine takes: here the pages are there before programs are compiled and products tuned.
            options: dict[str, Any] = {**SETTINGS, "gpu_memory_utilization": 0.6, **overrides}
            config = EngineConfig(model=str(path), **options)
            self.config: ModelConfig = open_config(str(path))[0]
        self.settings: Settings = settle(config, self.config, weights_bytes(self.config))
        dtype = jnp.dtype(self.settings.dtype)
        self.book = ProgramBook(self.settings, *abstract_model(self.config, dtype))
        self._weights = self.book.pack(dummy_model(self.config, dtype, 0)[1])
        self._pages: Any = tuple(jnp.zeros(spec.shape, spec.dtype) for spec in self.book.kv_specs)
        self._table: Any = jnp.zeros(self.book.page_table_spec.shape, jnp.int32)
        self._state: Any = state_to_tuple(init_state(self.settings.max_num_seqs, self.config.vocab_size))
        self._context = context

    def lowered(self, case: Case) -> jax.stages.Lowered:
        """The program of a case, not compiled."""
        wanted = f"sample_greedy_{case.size}" if case.kind == "sample" else f"forward_{case.kind}_{case.size}"
        programs = {program.name: program for program in self.book}
        if wanted not in programs:
            raise SystemExit(f"no program {wanted}; there are {', '.join(sorted(programs))}")
        return programs[wanted].lower()

    def seconds(self, case: Case, program: jax.stages.Compiled) -> tuple[float, float]:
        """(a call while others wait behind it, the host's part of a call), medians."""
        step = self._sampler(case, program) if case.kind == "sample" else self._forward(case, program)
        walls, hosts = [], []
        jax.block_until_ready(step())
        began = time.perf_counter()
        jax.block_until_ready(step())
        calls = max(5, min(200, round(_SECONDS / (time.perf_counter() - began))))
        for _ in range(_REPEATS + 1):
            began = time.perf_counter()
            out = step()
            for _ in range(calls - 1):
                out = step()
            hosts.append((time.perf_counter() - began) / calls)
            jax.block_until_ready(out)
            walls.append((time.perf_counter() - began) / calls)
        return float(np.median(walls[1:])), float(np.median(hosts[1:]))

    def _forward(self, case: Case, program: jax.stages.Compiled) -> Callable[[], jax.Array]:
        shape = next(
            f
            for f in self.settings.lattice.forwards
            if (f.kind, f.num_tokens, f.scores_prompts) == (case.kind, case.size, False)
        )
        plan = self._plan(case, shape)
        pages = np.array(new_pages(plan), np.int32).T
        self._table = self._table.at[pages[0], pages[1]].set(pages[2])
        vector = pack(plan, shape, [], self.settings.max_num_seqs)
        first = np.int32(0)  # step of a burst

        def step() -> jax.Array:
            hidden, self._pages, self._table = program(
                self._weights.model, self._pages, self._table, self._state[0], vector, first
            )
            return hidden

        return step

    def _sampler(self, case: Case, program: jax.stages.Compiled) -> Callable[[], jax.Array]:
        ints = np.zeros((case.size, NUM_INTS), np.int32)
        floats = np.zeros((case.size, NUM_FLOATS), np.float32)
        fill_padding(ints, floats, self.settings.max_num_seqs)
        numbers = np.concatenate([ints, floats.view(np.int32)], axis=1)
        hidden = jnp.ones((case.size, self.config.hidden_size), self.settings.dtype)
        first = np.int32(0)  # step of a burst

        def step() -> jax.Array:
            (ids,), (last_token,) = program(self._weights.head, self._state[:1], hidden, numbers, first)
            self._state = (last_token, *self._state[1:])
            return ids

        return step

    def _plan(self, case: Case, shape: ForwardShape) -> StepPlan:
        """Decode: `rows` sequences of `context` tokens.  Mixed: one prompt chunk a row, without a past."""
        count = 1 if case.kind == "decode" else shape.num_tokens // case.rows
        start = self._context - 1 if case.kind == "decode" else 0
        num_pages = -(-(start + count) // self.settings.page_size)
        order = np.random.default_rng(0).permutation(self.settings.memory.num_pages - 1) + 1
        # Random, as the engine's prompts are: with equal tokens a pass of 8192 took 151 ms, where prefill in the engine
        # comes to about 186 a pass (H100, 2026-11-25; why was not measured).
        tokens = np.random.default_rng(1).integers(7, self.config.vocab_size, (case.rows, count))
        entries = tuple(
            PlanEntry(
                seq_id=row,
                slot=row,
                start=start,
                token_ids=tuple(map(int, row_tokens)),
                samples=True,
                num_generated=0,
                page_offset=0,
                new_pages=tuple(int(page) for page in order[row * num_pages : (row + 1) * num_pages]),
            )
            for row, row_tokens in enumerate(tokens)
        )
        return StepPlan(admissions=(), entries=entries)


def main() -> int:
    """Compile the cases of every choice side by side, then time one after the other."""
    args = _parse()
    bench = Bench(args.model, args.context, dict(args.engine))
    lowered = {case: bench.lowered(case) for case in args.shapes}
    platform = bench.settings.platform

    def compiled(case: Case, choice: str) -> jax.stages.Compiled:
        options = {**compiler_options(platform, rows=case.size), **CHOICES[choice]}
        return lowered[case].compile({name: value for name, value in options.items() if value is not None})

    rows = []
    for choice in args.settings:
        began = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            programs = list(pool.map(lambda case, choice=choice: compiled(case, choice), args.shapes))
        compile_seconds = time.perf_counter() - began
        for case, program in zip(args.shapes, programs, strict=True):
            wall, host = bench.seconds(case, program)
            floor = (
                floor_ms(args.model, bench.config, case.rows, args.context) if case.kind == "decode" else None
            )
            rows.append((f"{choice} {case.name}", 1000 * wall, 1000 * host, floor, compile_seconds))
    print_table(
        f"{args.model} on {bench.settings.device_kind}, jax {jax.__version__}, context {args.context}, ms",
        ("program", "call", "host's part", "floor with head", "compiled in, s"),
        rows,
    )
    return 0


def _case(text: str) -> Case:
    program, _, rows = text.partition("@")
    kind, _, size = program.partition(":")
    return Case(kind, int(size), int(rows or size))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h100.forward", description=__doc__)
    parser.add_argument("--model", choices=TEXT_MODELS, default="8b")
    parser.add_argument(
        "--shapes", type=lambda text: [_case(part) for part in text.split(",")], required=True
    )
    parser.add_argument("--settings", type=lambda text: text.split(","), default=["engine"])
    parser.add_argument("--context", type=int, default=580, help="tokens in the cache of each decoding row")
    add_engine_options(parser)
    args = parser.parse_args()
    if unknown := set(args.settings) - set(CHOICES):
        parser.error(
            f"unknown settings {', '.join(sorted(unknown))}; there are {json.dumps(sorted(CHOICES))}"
        )
    return args


if __name__ == "__main__":
    raise SystemExit(main())
