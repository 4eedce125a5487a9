"""Find the block sizes of the GPU decode kernel: time every sensible choice, keep the best of each shape.

    PYTHONPATH=. python benchmarks/tune_decode.py                 # rewrites the rows in kernels_pallas/tuning.py
    PYTHONPATH=. python benchmarks/tune_decode.py --output FILE   # writes the new tuning.py there instead
    PYTHONPATH=. python benchmarks/tune_decode.py --check         # times what tuning.py has, writes nothing

A call runs the kernel over enough layers' pages that no layer finds its own in the second-level cache, in a chain
inside one program, so that nothing of the host is timed.  µs are of one layer: rope, KV write and attention.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.kernels_pallas import gpu_decode, reference, tuning
from jaxserve.kernels_pallas.heads import RopeTable, rotate
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.scoring import Scoring
from jaxserve.kernels_pallas.tuning import DecodeTuning

READ_RATE = 3.0e12  # bytes per second that an H100 reads from its memory, measured
CHAIN_BYTES = 300e6  # of all layers together: six times the second-level cache
TARGET_SECONDS = 0.008  # of one timed call
REPEATS = 5
NEARLY = 1.02  # choices this close to the best count as equal
LONG_SPLIT = 1024  # tokens that a program of a full device takes before a row is split
_BEGIN, _END = "# measured rows begin\n", "# measured rows end\n"


@dataclass(frozen=True)
class Shape:
    """What one kernel call sees."""

    model: str
    batch: int
    context: int
    head_dim: int
    page_dtype: Any
    page_size: int
    num_kv_heads: int = 8
    group: int = 4

    @property
    def programs(self) -> int:
        return self.batch * self.num_kv_heads

    @property
    def layer_bytes(self) -> int:
        """Keys and values of the context, read once."""
        itemsize = jnp.dtype(self.page_dtype).itemsize
        return self.batch * self.context * self.num_kv_heads * 2 * self.head_dim * itemsize

    @property
    def num_layers(self) -> int:
        return max(8, min(96, round(CHAIN_BYTES / self.layer_bytes)))

    @property
    def key(self) -> tuple[int, int, str, int]:
        return self.head_dim, self.group, jnp.dtype(self.page_dtype).name, self.programs

    def rule(self) -> DecodeTuning:
        """Where the search begins."""
        itemsize = jnp.dtype(self.page_dtype).itemsize
        return tuning.decode_rule(head_dim=self.head_dim, itemsize=itemsize, num_programs=self.programs)


@dataclass
class Inputs:
    """Random arguments of a chain of layers.  Pages and counters are donated to a call, and replaced by its own."""

    qkv: jax.Array
    pages: tuple[jax.Array, ...]
    meta: AttentionMetadata
    rope: RopeTable
    counters: jax.Array


def main() -> int:
    """Time, print, write."""
    args = _parse()
    began = time.monotonic()
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"tune_decode needs a GPU; JAX found {device.device_kind}")
    print(
        f"{device.device_kind}, jax {jax.__version__}, {args.page_dtype} pages of {args.page_size}",
        flush=True,
    )
    best: dict[tuple[Any, ...], DecodeTuning] = {}
    for model in args.models:
        for batch in args.batches:
            shape = Shape(
                model,
                batch,
                args.context,
                {"8b": 128, "1b": 64}[model],
                jnp.dtype(args.page_dtype),
                args.page_size,
                args.kv_heads,
            )
            if time.monotonic() - began > args.limit:
                print(f"{model} batch {batch}: left out, {args.limit:.0f} s are over", flush=True)
                continue
            best[(device.device_kind, *shape.key)] = _tune(shape, check_only=args.check, verbose=args.verbose)
    if not args.check:
        _write(best, args.output)
    print(f"{time.monotonic() - began:.0f} s")
    return 0


def _tune(shape: Shape, *, check_only: bool, verbose: bool) -> DecodeTuning:
    inputs = make_inputs(shape)
    check(shape, inputs)
    times: dict[DecodeTuning, float] = {}

    def run(choices: list[DecodeTuning]) -> None:
        new = [choice for choice in dict.fromkeys(choices) if choice not in times]
        with ThreadPoolExecutor(8) as pool:  # compiling is what takes the time
            compiled = list(pool.map(lambda choice: _compile(shape, inputs, choice), new))
        for choice, call in zip(new, compiled, strict=True):
            times[choice] = _time(shape, inputs, call) if call is not None else float("inf")
            if verbose:
                print(f"    {times[choice]:8.2f} µs  {choice}", flush=True)

    kept = tuning.decode_tuning(
        jax.devices()[0].device_kind,
        head_dim=shape.head_dim,
        group=shape.group,
        dtype=jnp.dtype(shape.page_dtype).name,
        itemsize=jnp.dtype(shape.page_dtype).itemsize,
        num_programs=shape.programs,
    )
    run([kept])
    chosen = kept
    if not check_only:
        run(_splits(shape))
        run(_blocks(_best(times)))
        run(_pipelines(_best(times)))
        chosen = _best(times)
    floor = shape.layer_bytes / READ_RATE * 1e6
    print(
        f"{shape.model} batch {shape.batch:3d} context {shape.context}: {times[chosen]:7.2f} µs, floor {floor:7.2f} "
        f"({floor / times[chosen]:4.0%}), tuning.py had {times[kept]:7.2f}; {len(times)} choices; {chosen}",
        flush=True,
    )
    return chosen


def _splits(shape: Shape) -> list[DecodeTuning]:
    """How tokens are split among programs."""
    rule = shape.rule()
    if shape.programs >= 512:
        splits = [(1, LONG_SPLIT), (4, LONG_SPLIT), (4, 256)]
    else:
        most = min(64, 1 << (1024 // shape.programs).bit_length() - 1)
        splits = [(most, tokens) for tokens in (32, 64, 128, 256, LONG_SPLIT)]
    return [
        replace(rule, num_splits=number, split_tokens=tokens, block_kv=min(rule.block_kv, tokens))
        for number, tokens in splits
    ]


def _blocks(best: DecodeTuning) -> list[DecodeTuning]:
    """Other blocks, a split's tokens being whole blocks."""
    sizes = [size for size in (best.block_kv // 2, best.block_kv * 2) if 16 <= size <= 128]
    return [replace(best, block_kv=size, split_tokens=max(size, best.split_tokens)) for size in sizes]


def _pipelines(best: DecodeTuning) -> list[DecodeTuning]:
    """Warps and pipeline depth."""
    return [
        replace(best, num_warps=warps, num_stages=stages)
        for warps, stages in ((2, 3), (8, 3), (4, 2), (4, 4), (2, 2), (2, 4), (1, 3))
    ]


def _best(times: dict[DecodeTuning, float]) -> DecodeTuning:
    """The fastest, or among those nearly as fast the one that can split long rows the furthest."""
    fastest = min(times.values())
    near = [choice for choice, seconds in times.items() if seconds <= fastest * NEARLY]
    return max(near, key=lambda choice: (choice.num_splits > 1, -times[choice]))


def make_inputs(shape: Shape) -> Inputs:
    """Random qkv and pages; every row's pages lie in random order."""
    rng = np.random.default_rng(0)
    row_pages = -(-shape.context // shape.page_size)
    max_pages = 2 * row_pages
    num_pages = 1 + shape.batch * row_pages
    table = np.zeros((shape.batch, max_pages), np.int32)
    table[:, :row_pages] = 1 + rng.permutation(shape.batch * row_pages).reshape(shape.batch, row_pages)
    rows = np.arange(shape.batch, dtype=np.int32)
    empty = jnp.zeros((0,), jnp.int32)
    positions = jnp.full((shape.batch,), shape.context - 1, jnp.int32)
    meta = AttentionMetadata(
        positions=positions,
        token_rows=jnp.asarray(rows),
        page_table=jnp.asarray(table),
        kv_lens=positions + 1,
        query_starts=jnp.arange(shape.batch + 1, dtype=jnp.int32),
        tile_rows=empty,
        tile_starts=empty,
        num_tiles=jnp.int32(0),
        kind="decode",
        tile_size=1,
    )
    angles = positions[:, None] * jnp.asarray(rng.uniform(0.001, 1.0, shape.head_dim // 2), jnp.float32)
    page_shape = (num_pages, shape.page_size, shape.num_kv_heads, 2, shape.head_dim)
    random = jax.jit(lambda key: jax.random.normal(key, page_shape, jnp.bfloat16).astype(shape.page_dtype))
    keys = jax.random.split(jax.random.key(1), shape.num_layers + 1)
    qkv_shape = (shape.batch, shape.num_kv_heads, shape.group + 2, shape.head_dim)
    return Inputs(
        qkv=jax.random.normal(keys[-1], qkv_shape, jnp.bfloat16),
        pages=tuple(random(key) for key in keys[:-1]),
        meta=meta,
        rope=RopeTable(jnp.cos(angles), jnp.sin(angles)),
        counters=jnp.zeros((shape.batch, shape.num_kv_heads), jnp.int32),
    )


def check(shape: Shape, inputs: Inputs, *, interpret: bool = False) -> None:
    """The first rows of one layer against the reference.  Raises AssertionError where they differ."""
    few = min(4, shape.batch)
    call = partial(
        gpu_decode.decode_attention,
        scoring=Scoring(shape.head_dim**-0.5),
        rope=inputs.rope,
        counters=inputs.counters,
        interpret=interpret,
    )
    out, pages, counters = jax.jit(call)(inputs.qkv, inputs.pages[0], inputs.meta)
    assert not np.asarray(counters).any(), "the counters are not back at zero"
    used = np.asarray(inputs.meta.page_table)[:few]
    rows = slice(0, few)
    turned = RopeTable(inputs.rope.cos[rows], inputs.rope.sin[rows])
    qkv = inputs.qkv[rows]
    q = rotate(qkv[:, :, :-2].reshape(few, -1, shape.head_dim), turned)
    k, v = rotate(qkv[:, :, -2], turned), qkv[:, :, -1]
    # The rows' pages alone, numbered anew, so that no gigabytes travel to the host.
    numbers, table = np.unique(used, return_inverse=True)
    meta = replace(
        inputs.meta,
        page_table=jnp.asarray(table.reshape(used.shape).astype(np.int32)),
        kv_lens=inputs.meta.kv_lens[rows],
        positions=inputs.meta.positions[rows],
        token_rows=inputs.meta.token_rows[rows],
    )
    given, taken = (np.asarray(x[jnp.asarray(numbers)]) for x in (inputs.pages[0], pages))
    want, want_pages = reference.paged_attention(
        np.asarray(q), np.asarray(k), np.asarray(v), given, meta, Scoring(shape.head_dim**-0.5)
    )
    np.testing.assert_allclose(
        np.asarray(out[rows], np.float32), want.astype(np.float32), atol=0.02, rtol=0.02
    )
    # A key may be rounded to the number beside the reference's.
    step = 2.0 * float(jnp.finfo(shape.page_dtype).eps)
    np.testing.assert_allclose(taken.astype(np.float32), want_pages.astype(np.float32), atol=2e-3, rtol=step)


def _chain(shape: Shape, choice: DecodeTuning) -> Any:
    """All layers, several times over, as a function to be jitted with the first two arguments donated."""

    def chain(
        pages: Any, counters: jax.Array, qkv: jax.Array, rope: RopeTable, meta: AttentionMetadata
    ) -> Any:
        def layers(_: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            all_pages, counters, out = carry
            written = []
            for layer_pages in all_pages:
                # The counters are what makes a layer wait for the one before it.
                out, layer_pages, counters = gpu_decode.decode_attention(
                    qkv,
                    layer_pages,
                    meta,
                    Scoring(shape.head_dim**-0.5),
                    rope=rope,
                    counters=counters,
                    tuning=choice,
                )
                written.append(layer_pages)
            return tuple(written), counters, out

        out = jnp.zeros((shape.batch, shape.num_kv_heads * shape.group, shape.head_dim), qkv.dtype)
        carry: tuple[Any, Any, Any] = (pages, counters, out)
        return lax.fori_loop(0, _rounds(shape), layers, carry)

    return chain


def _rounds(shape: Shape) -> int:
    seconds = shape.num_layers * (shape.layer_bytes / READ_RATE + 4e-6)
    return max(1, round(TARGET_SECONDS / seconds))


def _compile(shape: Shape, inputs: Inputs, choice: DecodeTuning) -> Any:
    """The compiled chain, or None where the choice does not fit the device."""
    chain = jax.jit(_chain(shape, choice), donate_argnums=(0, 1))
    try:
        return chain.lower(inputs.pages, inputs.counters, inputs.qkv, inputs.rope, inputs.meta).compile()
    except jax.errors.JaxRuntimeError as error:  # too much shared memory
        print(f"    {choice} does not compile: {str(error).splitlines()[0]}", flush=True)
        return None


def _time(shape: Shape, inputs: Inputs, call: Any) -> float:
    """µs of one layer, median."""
    samples = []
    for _ in range(REPEATS + 1):
        jax.block_until_ready(inputs.pages)
        start = time.perf_counter()
        inputs.pages, inputs.counters, out = call(
            inputs.pages, inputs.counters, inputs.qkv, inputs.rope, inputs.meta
        )
        jax.block_until_ready(out)
        samples.append(time.perf_counter() - start)
    return float(np.median(samples[1:])) / (shape.num_layers * _rounds(shape)) * 1e6


def _write(best: dict[tuple[Any, ...], DecodeTuning], output: Path) -> None:
    """tuning.py with these rows, and those of other shapes and devices as they were."""
    source = Path(tuning.__file__)
    text = source.read_text()
    rows = {**tuning.measured_rows(), **best}
    lines = [f"    {key!r}: DecodeTuning{astuple(choice)!r},\n" for key, choice in sorted(rows.items())]
    start, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    table = "_MEASURED: dict[_Key, DecodeTuning] = {\n" + "".join(lines).replace("'", '"') + "}\n"
    output.write_text(text[:start] + table + text[end:])
    print(f"{len(best)} rows are in {output}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find the block sizes of the GPU decode kernel.")
    parser.add_argument("--models", nargs="+", choices=("8b", "1b"), default=("8b", "1b"))
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument(
        "--kv-heads", type=int, default=8, help="of a device: both models have 8, and 2 on each of four"
    )
    parser.add_argument("--context", type=int, default=600, help="tokens in the cache, the step's included")
    parser.add_argument("--page-size", type=int, default=64, help="64 is what engines on GPUs have")
    parser.add_argument("--page-dtype", default="bfloat16", help="e.g. float8_e4m3fn")
    parser.add_argument("--limit", type=float, default=85.0, help="seconds after which no new shape begins")
    parser.add_argument("--check", action="store_true", help="time the rows of tuning.py alone")
    parser.add_argument("--verbose", action="store_true", help="print every choice's time")
    parser.add_argument("--output", type=Path, default=Path(tuning.__file__))
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
