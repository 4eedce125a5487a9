"""Compile an engine's programs for an H100 on a machine without a GPU, and check what became of them.

    make gpu-check

Of decode steps, on one GPU and over four: one CUDA graph and nothing beside it, pages written in place, no copy as
large as a layer's pages.  Of every kernel of ours: no register spilled to memory.  Of float32 programs: no tf32, but
spills are only told, since products without tensor cores live in registers.  The model has the dimensions of Llama 8B
and few layers; what two layers more add is what every layer adds, and is printed, kernel by kernel.  Attention alone is
compiled for other head sizes too, with float8 pages, a window and a cap.

There is nothing to try kernels on, so XLA takes the first that it finds for a product: on a GPU, where it tries, more
of them are its own, and some of those bring a sum over parts as another launch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

_FOLDER = tempfile.TemporaryDirectory(prefix="gpu-check-")  # goes with the process
DUMPS = Path(_FOLDER.name)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # prints what ptxas says
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_gpu_autotune_level=0",
        f"--xla_dump_to={DUMPS}",
        "--xla_dump_emitter_re=ptx",
    )
)

import jax  # noqa: E402  # it and what follows read the environment
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from jaxserve.config import EngineConfig, ModelConfig  # noqa: E402
from jaxserve.engine.xla_options import compiler_options  # noqa: E402
from jaxserve.kernels_pallas.attention import attention, start_step  # noqa: E402
from jaxserve.kernels_pallas.heads import RopeTable  # noqa: E402
from jaxserve.kernels_pallas.metadata import AttentionMetadata  # noqa: E402
from jaxserve.kernels_pallas.scoring import Scoring  # noqa: E402
from jaxserve.models.sharding import engine_mesh  # noqa: E402
from tests.engine.pretend_device import pretend_book, pretend_device  # noqa: E402
from tests.engine.tiny_engine import TINY  # noqa: E402

MEMORY = 72 * 2**30
LAYERS = (2, 4)
OURS = ("decode_attention", "add_norm", "split_and_write", "prefill_attention", "draw_rows")
# Bytes a thread.  The sum over splits, done once a row, with what was measured as the fastest tuning for 64 programs
# (tuning.py); a little in the sizes that nothing was measured for.
ALLOWED_SPILL = {"decode_attention": 64}
ALLOWED_SPILL_ELSEWHERE = 128
ELSEWHERE = "attention alone"
_ITEM_BYTES = {
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s32": 4,
    "u32": 4,
    "pred": 1,
    "s8": 1,
}


@dataclass(frozen=True)
class Job:
    """Programs of one engine."""

    options: dict[str, Any]  # of EngineConfig
    names: tuple[str, ...]
    num_layers: int = LAYERS[0]


@dataclass(frozen=True)
class Result:
    """What XLA has made of a program."""

    name: str
    thunks: list[str]  # lines: what the host launches, and indented what stands in a graph
    hlo: str
    has_tf32: bool
    kernels: list[tuple[str, int, int]]  # of ours: name, registers, and bytes that a thread spills
    aliased: int  # bytes of arguments that are results too
    scratch: int  # bytes
    layer_bytes: int  # of one layer's pages
    num_layers: int

    @property
    def launches(self) -> Counter[str]:
        """Kernels by name, without the numbers by which XLA tells them apart."""
        found = Counter()
        for line in self.thunks:
            kind, _, name = re.match(r"\s*\d+: (\w+)\s+\[(.*?)\] ?(\S*)", line).groups()  # type: ignore[union-attr]  # every line has this form
            if kind != "kCommandBuffer":
                found[re.sub(r"(_\d+)+$", "", name) or kind] += 1
        return found

    @property
    def largest_copy(self) -> int:
        """Bytes of the largest array that a copy of its own writes."""
        shapes = re.findall(r"= (\w+)\[([\d,]*)\]\S* copy(?:-start)?\(", self.hlo)
        sizes = [_ITEM_BYTES.get(kind, 8) * prod(map(int, dims.split(","))) for kind, dims in shapes if dims]
        return max(sizes, default=0)


def llama(num_layers: int) -> ModelConfig:
    """Llama 8B, but for the number of layers."""
    return replace(
        TINY,
        num_layers=num_layers,
        layer_windows=(None,) * num_layers,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )


def compile_attention(
    head_dim: int, page_dtype: str, *, decode: bool, scoring: Scoring
) -> list[tuple[str, int, int]]:
    """Name, registers and spilled bytes of the kernels of one layer's attention in a bfloat16 model."""
    tokens, rows, kv_heads, group, tile = (64, 64, 8, 4, 1) if decode else (4096, 9, 8, 4, 32)
    ints: Any = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    meta = AttentionMetadata(
        positions=ints((tokens,)),
        token_rows=ints((tokens,)),
        page_table=ints((rows, 64)),
        kv_lens=ints((rows,)),
        query_starts=ints((rows + 1,)),
        tile_rows=ints((tokens // tile + rows,)),
        tile_starts=ints((tokens // tile + rows,)),
        num_tiles=ints(()),
        kind="decode" if decode else "mixed",
        tile_size=tile,
        backend="gpu",
    )
    angles: Any = jax.ShapeDtypeStruct((tokens, head_dim // 2), jnp.float32)

    def layer(qkv: jax.Array, pages: jax.Array, meta: AttentionMetadata, rope: RopeTable) -> Any:
        return attention(qkv, pages, meta, start_step(meta, kv_heads), scoring, rope=rope, norms=None)[:2]

    shapes = (
        jax.ShapeDtypeStruct((tokens, kv_heads, group + 2, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((1024, 64, kv_heads, 2, head_dim), page_dtype),
        meta,
        RopeTable(angles, angles),
    )
    with pretend_device("gpu", MEMORY):
        lowered = _lower_on(_h100s(), jax.jit(layer, donate_argnums=1), *shapes)
        return _kernels(*_compile(lowered, {})[1:])


def compile_job(job: Job) -> list[Result]:
    """Compile them as the engine does."""
    config = EngineConfig(model="llama", max_num_seqs=256, **job.options)
    num_devices = config.tensor_parallel_size
    mesh = _h100s(num_devices)
    over = None if num_devices == 1 else mesh  # arguments say themselves how they lie
    lower = partial(_lower_on if over is None else _lower_over, mesh)
    results = []
    with pretend_book(config, llama(job.num_layers), lower, memory=MEMORY, mesh=over) as (settings, book):
        programs = {program.name: program for program in book}
        for name in job.names:
            options = compiler_options("gpu", num_devices, programs[name].rows)
            compiled, dumps, said = _compile(programs[name].lower(), options)
            memory = compiled.memory_analysis()
            assert memory is not None
            results.append(
                Result(
                    name=f"{name} {job.options or ''}".strip(),
                    thunks=_text(dumps, "_after_thunk_passes.txt", "thunk_sequence.txt").splitlines(),
                    hlo=_text(dumps, "gpu_after_optimizations.txt"),
                    has_tf32=any("tf32" in path.read_text() for path in dumps if path.suffix == ".ptx"),
                    kernels=_kernels(dumps, said),
                    aliased=memory.alias_size_in_bytes,
                    scratch=memory.temp_size_in_bytes,
                    layer_bytes=settings.memory.kv_cache // job.num_layers,
                    num_layers=job.num_layers,
                )
            )
    return results


def _h100s(count: int = 1) -> Mesh:
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x1x{count}",
        target_config=(Path(__file__).parent / "h100.txtpb").read_text(),
    )
    return engine_mesh(topology.devices[:count], count, 1)


def _lower_on(mesh: Mesh, jitted: Any, *specs: Any) -> jax.stages.Lowered:
    on_device = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on_device), specs)
    return _lower_over(mesh, jitted, *placed)


def _lower_over(mesh: Mesh, jitted: Any, *placed: Any) -> jax.stages.Lowered:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(*placed).lower()


def _compile(
    lowered: jax.stages.Lowered, options: dict[str, Any]
) -> tuple[jax.stages.Compiled, list[Path], str]:
    """The program, the files that XLA has dumped, and what the compiler of Mosaic GPU has printed."""
    before = set(DUMPS.iterdir())
    with _standard_output() as said:
        compiled = lowered.compile(options)
    return compiled, [path for path in sorted(DUMPS.iterdir()) if path not in before], said.read_text()


@contextmanager
def _standard_output() -> Iterator[Path]:
    """A file that takes what any library of this process prints meanwhile."""
    path = DUMPS / "standard-output"
    sys.stdout.flush()
    kept = os.dup(1)
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield path
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _text(dumps: Sequence[Path], *endings: str) -> str:
    """The first file that there is; passes that change nothing leave none."""
    return next(path for end in endings for path in dumps if path.name.endswith(end)).read_text()


def faults(result: Result) -> list[str]:
    """What is wrong with a program; empty if nothing is."""
    found = []
    outside = [line for line in result.thunks if not line.startswith(" ")]
    if result.name.startswith("forward_decode") and (len(outside) != 1 or "kCommandBuffer" not in outside[0]):
        found.append(f"{len(outside)} launches outside a graph, or graphs, instead of one graph")
    if result.name.startswith("forward"):
        if result.aliased < result.num_layers * result.layer_bytes:
            found.append(f"only {result.aliased} bytes are updated in place, less than all pages")
        if result.largest_copy >= result.layer_bytes:
            found.append(f"a copy of {result.largest_copy} bytes: a layer's pages have {result.layer_bytes}")
        if result.scratch >= result.layer_bytes:
            found.append(f"{result.scratch} bytes of scratch: there may be a copy of a layer's pages in them")
    if "float32" in result.name and result.has_tf32:
        found.append("float32 is multiplied as tf32")
    return found


def _kernels(dumps: Sequence[Path], said: str) -> list[tuple[str, int, int]]:
    """Name, registers and spilled bytes of a thread of each kernel of ours."""
    found = _usage(said)
    for path in dumps:
        if path.suffix == ".ptx" and re.search(rf"\.entry ({'|'.join(OURS)})", path.read_text()):
            found += _usage(_assemble(path))
    return found


def _usage(said: str) -> list[tuple[str, int, int]]:
    """What ptxas says of each entry function."""
    found = []
    for part in said.split("Compiling entry function '")[1:]:
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        (used,) = re.findall(r"Used (\d+) registers", part)
        found.append((part.split("'")[0].removesuffix("_mosaic_gpu_kernel"), int(used), spilled))
    return found


def _assemble(ptx: Path) -> str:
    """What ptxas says of it."""
    command = [_ptxas(), "-v", "-arch=sm_90a", "-o", os.devnull, str(ptx)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _ptxas() -> str:
    for package in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            if (path := Path(folder) / "bin" / "ptxas").exists():
                return str(path)
    raise SystemExit("no ptxas: pip install nvidia-cuda-nvcc")


def main() -> int:
    """The number of faults."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    decodes = tuple(f"forward_decode_{n}" for n in (1, 8, 64, 256))
    mixed = ("forward_mixed_64", "forward_mixed_8192")
    jobs = [Job({}, (*decodes, *mixed), num_layers) for num_layers in LAYERS]
    jobs += [
        Job({}, ("sample_random_64",)),
        Job({"tensor_parallel_size": 4}, (*decodes[1:3], *mixed, "sample_greedy_64", "sample_random_64")),
        Job({"kv_cache_dtype": "fp8"}, (decodes[1], mixed[0])),
        Job({"kv_cache_dtype": "fp8_e5m2", "dtype": "float16"}, (decodes[1], mixed[0])),
        Job({"dtype": "float32"}, (decodes[1], mixed[0])),
    ]
    print(f"jax {jax.__version__}, compiled for H100; Llama 8B with {LAYERS[0]} and {LAYERS[1]} layers")
    num_faults = 0
    results: dict[tuple[str, int], Result] = {}
    kernels: dict[tuple[str, int, int], str] = {}  # to the first program that has it
    for job in jobs:
        for result in compile_job(job):
            results[result.name, job.num_layers] = result
            for kernel in result.kernels if job.num_layers == LAYERS[0] else ():
                kernels.setdefault(kernel, result.name)
            for fault in faults(result):
                num_faults += 1
                print(f"FAULT {result.name}, {job.num_layers} layers: {fault}")
    print("\nlaunches")
    for (name, num_layers), result in results.items():
        more = results.get((name, LAYERS[1]))
        if num_layers != LAYERS[0] or more is None:
            continue
        added = more.launches - result.launches
        count = LAYERS[1] - LAYERS[0]
        a_layer = ", ".join(f"{n / count:g} {kernel}" for kernel, n in added.most_common())
        once = result.launches.total() - LAYERS[0] * added.total() // count
        print(f"{name}: {added.total() / count:g} a layer ({a_layer}), {once} beside them")
    for head_dim in (64, 80, 96, 256):
        for page_dtype, scoring in (
            ("bfloat16", Scoring(0.1)),
            ("float8_e4m3fn", Scoring(0.1, window=100, soft_cap=30.0)),
        ):
            for decode in (True, False):
                for kernel in compile_attention(head_dim, page_dtype, decode=decode, scoring=scoring):
                    kernels.setdefault(kernel, f"{ELSEWHERE}, head_dim {head_dim}, {page_dtype} pages")
    print("\nour kernels: registers, bytes spilled, where from")
    for (name, used, spilled), program in sorted(kernels.items()):
        allowed = ALLOWED_SPILL_ELSEWHERE if program.startswith(ELSEWHERE) else ALLOWED_SPILL.get(name, 0)
        is_fault = spilled > allowed and "float32" not in program
        print(f"{'FAULT ' if is_fault else ''}{name:<30}{used:4}{spilled:6}  {program}")
        num_faults += is_fault
    print(f"\n{num_faults} faults")
    return min(num_faults, 1)


if __name__ == "__main__":
    sys.exit(main())
