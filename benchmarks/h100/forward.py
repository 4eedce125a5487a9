"""`python -m benchmarks.h100.forward --model 1b --shapes decode:1,decode:8@1`: single programs, by settings of XLA.

Times forward passes (KIND:TOKENS, or KIND:TOKENS@ROWS with fewer rows in use), greedy samplers (sample:ROWS) and a step
of bursts (burst:ROWS) alone, without an engine around them, so that a few programs are compiled instead of all.  With
--engine tensor_parallel_size=2 they span two devices.
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
from benchmarks.h100.profiling import print_device, start_trace
from benchmarks.h100.tables import print_table
from benchmarks.h100.trace import device_report, read_trace
from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.batch import new_pages, pack
from jaxserve.engine.building import settle_engine
from jaxserve.engine.lattice import ForwardShape
from jaxserve.engine.pace import MAX_BURST
from jaxserve.engine.plan import PlanEntry, StepPlan
from jaxserve.engine.programs import ProgramBook
from jaxserve.engine.sampler_programs import num_state_arrays
from jaxserve.engine.sampling_rows import NUM_FLOATS, NUM_INTS, fill_padding
from jaxserve.engine.settle import Settings
from jaxserve.engine.xla_options import compiler_options
from jaxserve.loading.resolve import open_config
from jaxserve.models.on_devices import abstract_on_devices, dummy_on_devices

_SECONDS = 1.0  # of calls timed in a row, about: a GPU slows down when it runs hot
_REPEATS = 5
_TRACED = 24  # steps


@dataclass(frozen=True)
class Case:
    """One program, and how many of its rows are in use."""

    kind: str
    size: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.size}" + (f"@{self.rows}" if self.rows != self.size else "")

    @property
    def steps(self) -> int:
        """Of a call."""
        return MAX_BURST if self.kind == "burst" else 1


class Bench:
    """Weights, pages and programs of one model."""

    def __init__(self, model: str, context: int, overrides: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_model(model, Path(folder))
            # Less than the engine takes: here the pages are there before programs are compiled and products tuned.
            options: dict[str, Any] = {**SETTINGS, "gpu_memory_utilization": 0.6, **overrides}
            config = EngineConfig(model=str(path), **options)
            self.config: ModelConfig = open_config(str(path))[0]
        self.settings: Settings
        self.settings, devices = settle_engine(config, self.config)
        layout = self.settings.layout
        graphdef, abstract = abstract_on_devices(layout, jnp.dtype(self.settings.dtype), devices)
        self.book = ProgramBook(self.settings, graphdef, abstract)
        self._weights = self.book.pack(dummy_on_devices(abstract, 0, layout))
        self._pages: Any = tuple(_zeros(spec) for spec in self.book.kv_specs)
        self._table: Any = _zeros(self.book.page_table_spec)
        self._state: Any = tuple(_zeros(spec) for spec in self.book.state_specs)
        self._context = context

    def lowered(self, case: Case) -> jax.stages.Lowered:
        """The program of a case, not compiled."""
        sampler = f"sample_greedy_{case.size}"
        wanted = {"sample": sampler, "burst": f"burst_{case.size}_{sampler}"}.get(
            case.kind, f"forward_{case.kind}_{case.size}"
        )
        programs = {program.name: program for program in self.book}
        if wanted not in programs:
            raise SystemExit(f"no program {wanted}; there are {', '.join(sorted(programs))}")
        return programs[wanted].lower()

    def seconds(self, case: Case, program: jax.stages.Compiled) -> tuple[float, float]:
        """(a step while others wait behind it, the host's part of it), medians."""
        step, steps = self._step(case, program), case.steps
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
            hosts.append((time.perf_counter() - began) / calls / steps)
            jax.block_until_ready(out)
            walls.append((time.perf_counter() - began) / calls / steps)
        return float(np.median(walls[1:])), float(np.median(hosts[1:]))

    def profile(self, case: Case, program: jax.stages.Compiled, title: str) -> None:
        """Trace some steps on the first device, and print where their time goes."""
        step = self._step(case, program)
        jax.block_until_ready(step())
        calls = max(3, _TRACED // case.steps)
        with tempfile.TemporaryDirectory() as folder:
            start_trace(Path(folder))
            jax.block_until_ready([step() for _ in range(calls)])
            jax.profiler.stop_trace()
            device, _ = read_trace(Path(folder))
        report = device_report(device, calls * case.steps)
        if report is None:
            print(f"no kernel marks the steps of {title}: nothing ran on a GPU, or the trace was cut off")
        else:
            print_device(report, title)

    def _step(self, case: Case, program: jax.stages.Compiled) -> Callable[[], jax.Array]:
        """What calls a case's program once."""
        return {"sample": self._sampler, "burst": self._burst}.get(case.kind, self._forward)(case, program)

    def _forward(self, case: Case, program: jax.stages.Compiled) -> Callable[[], jax.Array]:
        vector, first = self._vector(case, case.kind), np.int32(0)  # step of a burst

        def step() -> jax.Array:
            hidden, self._pages, self._table = program(
                self._weights.model, self._pages, self._table, self._state[0], vector, first
            )
            return hidden

        return step

    def _sampler(self, case: Case, program: jax.stages.Compiled) -> Callable[[], jax.Array]:
        numbers = self._numbers(case)
        hidden = self.book.put(np.ones((case.size, self.config.hidden_size), self.settings.dtype))
        first = np.int32(0)  # step of a burst

        def step() -> jax.Array:
            (ids,), (last_token,) = program(self._weights.head, self._state[:1], hidden, numbers, first)
            self._state = (last_token, *self._state[1:])
            return ids

        return step

    def _burst(self, case: Case, program: jax.stages.Compiled) -> Callable[[], jax.Array]:
        vector, numbers = self._vector(case, "decode"), self._numbers(case)
        (shape,) = (s for s in self.settings.lattice.samples if s.name == f"sample_greedy_{case.size}")
        count = num_state_arrays(shape)

        def step() -> jax.Array:
            ids, self._pages, self._table, state = program(
                self._weights.model,
                self._weights.head,
                self._pages,
                self._table,
                self._state[:count],
                vector,
                numbers,
            )
            self._state = (*state, *self._state[count:])
            return ids

        return step

    def _vector(self, case: Case, kind: str) -> np.ndarray:
        """What a forward pass is told, its pages being in the table already."""
        shape = next(
            f
            for f in self.settings.lattice.forwards
            if (f.kind, f.num_tokens, f.scores_prompts) == (kind, case.size, False)
        )
        plan = self._plan(case, shape)
        pages = np.array(new_pages(plan), np.int32).T
        self._table = self._table.at[pages[0], pages[1]].set(pages[2])
        return pack(plan, shape, [], self.settings.max_num_seqs)

    def _numbers(self, case: Case) -> np.ndarray:
        """What a sampler is told."""
        ints = np.zeros((case.size, NUM_INTS), np.int32)
        floats = np.zeros((case.size, NUM_FLOATS), np.float32)
        fill_padding(ints, floats, self.settings.max_num_seqs)
        return np.concatenate([ints, floats.view(np.int32)], axis=1)

    def _plan(self, case: Case, shape: ForwardShape) -> StepPlan:
        """Decode: `rows` sequences of `context` tokens.  Mixed: one prompt chunk a row, without a past."""
        count = 1 if shape.kind == "decode" else shape.num_tokens // case.rows
        start = self._context - 1 if shape.kind == "decode" else 0
        num_pages = -(-(start + count + case.steps - 1) // self.settings.page_size)
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
                num_steps=case.steps,
            )
            for row, row_tokens in enumerate(tokens)
        )
        return StepPlan(admissions=(), entries=entries, num_steps=case.steps)


def main() -> int:
    """Compile the cases of every choice side by side, then time one after the other."""
    args = _parse()
    bench = Bench(args.model, args.context, dict(args.engine))
    lowered = {case: bench.lowered(case) for case in args.shapes}
    platform, num_devices = bench.settings.platform, bench.settings.layout.num_devices

    def compiled(case: Case, choice: str) -> jax.stages.Compiled:
        options = {**compiler_options(platform, num_devices, case.size), **_options_of(choice)}
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
                floor_ms(args.model, bench.config, case.rows, args.context)
                if case.kind in ("decode", "burst") and num_devices == 1
                else None
            )
            if args.profile:
                bench.profile(case, program, f"{choice} {case.name}")
            rows.append((f"{choice} {case.name}", 1000 * wall, 1000 * host, floor, compile_seconds))
    devices = f"{num_devices} x {bench.settings.device_kind}"
    print_table(
        f"{args.model} on {devices}, jax {jax.__version__}, context {args.context}, ms",
        ("program", "step", "host's part", "floor with head", "compiled in, s"),
        rows,
    )
    return 0


def _case(text: str) -> Case:
    program, _, rows = text.partition("@")
    kind, _, size = program.partition(":")
    return Case(kind, int(size), int(rows or size))


def _zeros(spec: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(spec.shape, spec.dtype, device=spec.sharding)


def _options_of(choice: str) -> dict[str, Any]:
    """One of CHOICES, or XLA's own options: NAME=VALUE, several joined by "+"."""
    if choice in CHOICES:
        return CHOICES[choice]
    return {name: json.loads(value) for name, _, value in (each.partition("=") for each in choice.split("+"))}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h100.forward", description=__doc__)
    parser.add_argument("--model", choices=TEXT_MODELS, default="8b")
    parser.add_argument(
        "--shapes", type=lambda text: [_case(part) for part in text.split(",")], required=True
    )
    parser.add_argument(
        "--settings",
        type=lambda text: text.split(","),
        default=["engine"],
        help=f"of XLA: {', '.join(CHOICES)}, or its own NAME=VALUE, VALUE in JSON, several joined by +",
    )
    parser.add_argument("--profile", action="store_true", help="also trace some steps of each")
    parser.add_argument("--context", type=int, default=580, help="tokens in the cache of each decoding row")
    add_engine_options(parser)
    args = parser.parse_args()
    if unknown := {choice for choice in args.settings if "=" not in choice} - set(CHOICES):
        parser.error(
            f"unknown settings {', '.join(sorted(unknown))}; there are {json.dumps(sorted(CHOICES))}"
        )
    return args


if __name__ == "__main__":
    raise SystemExit(main())
