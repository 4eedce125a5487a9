"""Time the GPU's prefill attention: every sensible cut of both kernels, checked first, in ms a layer and TFLOP/s.

    python benchmarks/tune_prefill.py                  # both models, all steps, under 90 s on an H100
    python benchmarks/tune_prefill.py --model 8B       # one of them

Attention alone, over pages that are filled; the writing of pages is timed beside it.  A call computes several layers,
so that what is planned once a step is shared as in a model; their random data together are larger than the
second-level cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.kernels_pallas import gpu_prefill, gpu_prefill_mosaic, gpu_split, xla
from jaxserve.kernels_pallas.gpu_prefill import PrefillConfig
from jaxserve.kernels_pallas.gpu_prefill_mosaic import MosaicConfig
from jaxserve.kernels_pallas.heads import RopeTable, split_heads
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.scoring import Scoring

NUM_LAYERS = 4  # of a call, each with data of its own
TARGET_SECONDS = 0.012  # of one timed run of calls
REPEATS = 3
ROWS = 65  # of the page table
TOLERANCE = 0.02  # of bfloat16 outputs, whose largest are about 4


@dataclass(frozen=True)
class Model:
    name: str
    head_dim: int
    num_heads: int = 32
    num_kv_heads: int = 8


MODELS = (Model("8B", 128), Model("1B", 64))
STEPS: dict[str, list[tuple[int, int]]] = {  # (tokens in the cache before, new tokens) of each row
    "4 x 2048": [(0, 2048)] * 4,
    "1 x 8192": [(0, 8192)],
    "48 decodes, 2000 behind 2096": [(1024, 1)] * 48 + [(2096, 2000)],
}
TRITON = [
    PrefillConfig(rows, keys, warps, stages)
    for rows, keys, warps in ((128, 64, 8), (128, 128, 8), (128, 64, 4), (64, 64, 4), (128, 32, 4))
    for stages in (2, 3)
]
MOSAIC = [MosaicConfig(128, 2), MosaicConfig(64, 2), MosaicConfig(64, 4), MosaicConfig(128, 3)]


@dataclass(frozen=True)
class Step:
    """Where the tokens of a step lie; its arrays are on the device."""

    sequences: list[tuple[int, int]]
    meta: AttentionMetadata
    num_tokens: int
    num_pages: int
    page_size: int

    def flops(self, model: Model) -> float:
        """Of the two products, over visible keys."""
        visible = sum(new * old + new * (new + 1) / 2 for old, new in self.sequences)
        return 4.0 * visible * model.num_heads * model.head_dim


@dataclass(frozen=True)
class Choice:
    """A way to compute a step."""

    label: str
    model: Model
    step_name: str
    step: Step
    function: Callable[..., jax.Array]


def make_step(sequences: list[tuple[int, int]], page_size: int, tile_size: int) -> Step:
    """The engine's layout of `sequences` over pages in random order, without padding tokens."""
    rng = np.random.default_rng(0)
    needed = [-(-(old + new) // page_size) for old, new in sequences]
    max_pages = max(needed) + 1
    pages = 1 + rng.permutation(sum(needed)).astype(np.int32)
    table = np.zeros((ROWS, max_pages), np.int32)
    kv_lens = np.zeros(ROWS, np.int32)
    starts = np.full(ROWS + 1, sum(new for _, new in sequences), np.int32)
    positions, token_rows, tile_rows, tile_starts = [], [], [], []
    token = page = 0
    for row, ((old, new), count) in enumerate(zip(sequences, needed, strict=True)):
        table[row, :count] = pages[page : page + count]
        kv_lens[row], starts[row] = old + new, token
        positions.append(np.arange(old, old + new))
        token_rows.append(np.full(new, row))
        tiles = np.arange(token, token + new, tile_size)
        tile_rows.append(np.full(len(tiles), row))
        tile_starts.append(tiles)
        token, page = token + new, page + count
    spare = np.zeros(token // tile_size + ROWS, np.int32)
    tile_lists = [np.concatenate([*tiles, spare])[: len(spare)] for tiles in (tile_rows, tile_starts)]
    arrays = (np.concatenate(positions), np.concatenate(token_rows), table, kv_lens, starts, *tile_lists)
    meta = AttentionMetadata(
        *(jnp.asarray(x, jnp.int32) for x in arrays),
        num_tiles=jnp.int32(sum(len(tiles) for tiles in tile_rows)),
        kind="mixed",
        tile_size=tile_size,
    )
    return Step(sequences, meta, token, 1 + sum(needed), page_size)


def make_choices(models: tuple[Model, ...], page_sizes: list[int]) -> list[Choice]:
    """Every choice at 4 x 2048 tokens, the likeliest elsewhere."""
    choices = []
    for model in models:
        scoring = Scoring(model.head_dim**-0.5)
        group = model.num_heads // model.num_kv_heads
        for step_name, sequences in STEPS.items():
            is_first = sequences is next(iter(STEPS.values()))
            for page_size in page_sizes if is_first else page_sizes[:1]:
                for config in TRITON if is_first and page_size == page_sizes[0] else TRITON[1:2]:
                    step = make_step(sequences, page_size, max(1, config.block_rows // group))
                    function = partial(gpu_prefill.attend, scoring=scoring, config=config)
                    choices.append(Choice(f"triton {_short(config)}", model, step_name, step, function))
                step = make_step(sequences, page_size, 32)
                for config in MOSAIC if is_first else MOSAIC[:2]:
                    function = partial(gpu_prefill_mosaic.attend, scoring=scoring, config=config)
                    choices.append(Choice(f"mosaic {_short(config)}", model, step_name, step, function))
    return choices


def _short(config: PrefillConfig | MosaicConfig) -> str:
    if isinstance(config, PrefillConfig):
        return f"{config.block_rows}x{config.block_keys} w{config.num_warps} s{config.num_stages}"
    return f"64x{config.block_keys} s{config.num_stages}"


def make_data(model: Model, step: Step) -> list[tuple[jax.Array, jax.Array]]:
    """Sets of queries [T, N, H] and pages [P, S, K, 2, H]."""
    q_shape = (step.num_tokens, model.num_heads, model.head_dim)
    kv_shape = (step.num_pages, step.page_size, model.num_kv_heads, 2, model.head_dim)
    keys = jax.random.split(jax.random.key(1), 2 * NUM_LAYERS)
    normal = partial(jax.random.normal, dtype=jnp.bfloat16)
    return [(normal(keys[2 * i], q_shape), normal(keys[2 * i + 1], kv_shape)) for i in range(NUM_LAYERS)]


@partial(jax.jit, static_argnames="group")
def expected(q: jax.Array, pages: jax.Array, table: jax.Array, position: jax.Array, group: int) -> jax.Array:
    """Attention of one query [N, H] at `position` over a row's pages, in float32."""
    kv = pages[table].astype(jnp.float32)
    kv = kv.reshape(-1, *kv.shape[2:])  # [C, K, 2, H]
    queries = q.astype(jnp.float32).reshape(kv.shape[1], group, -1)
    exact = lax.Precision.HIGHEST
    scores = jnp.einsum("kgh,ckh->kgc", queries, kv[:, :, 0], precision=exact) * q.shape[1] ** -0.5
    scores = jnp.where(jnp.arange(kv.shape[0]) <= position, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("kgc,ckh->kgh", weights, kv[:, :, 1], precision=exact).reshape(q.shape)


def largest_error(choice: Choice, out: jax.Array, q: jax.Array, pages: jax.Array) -> float:
    """Over the first, the last and some other tokens of the first and the last rows."""
    step, model = choice.step, choice.model
    starts = np.asarray(step.meta.query_starts)
    worst = 0.0
    for row in {0, len(step.sequences) - 1}:
        old, new = step.sequences[row]
        for nth in sorted({0, new // 3, min(new - 1, 1000), max(0, new - 65), new - 1}):
            token = int(starts[row]) + nth
            group = model.num_heads // model.num_kv_heads
            want = expected(q[token], pages, step.meta.page_table[row], jnp.int32(old + nth), group)
            error = float(jnp.abs(out[token].astype(jnp.float32) - want).max())
            worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def seconds_per_call(call: Callable[[], Any]) -> float:
    """Of the best of several runs of calls."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    count = max(2, int(TARGET_SECONDS / (time.perf_counter() - begin)))
    best = np.inf
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready([call() for _ in range(count)][-1])
        best = min(best, (time.perf_counter() - begin) / count)
    return best


def compile_choice(choice: Choice) -> Any:
    """An executable of (layers, meta), or the error that says why there is none."""
    model, step = choice.model, choice.step
    q = jax.ShapeDtypeStruct((step.num_tokens, model.num_heads, model.head_dim), jnp.bfloat16)
    kv_shape = (step.num_pages, step.page_size, model.num_kv_heads, 2, model.head_dim)
    layers = [(q, jax.ShapeDtypeStruct(kv_shape, jnp.bfloat16))] * NUM_LAYERS

    def run(data: Any, meta: AttentionMetadata) -> list[jax.Array]:
        return [choice.function(q, pages, meta) for q, pages in data]

    try:
        return jax.jit(run).lower(layers, step.meta).compile()
    except Exception as error:  # noqa: BLE001  # a cut may not fit the device in more ways than can be listed
        return error


def time_writes(model: Model) -> None:
    """Both ways to split a projection, turn its heads, and write keys and values, in the first step."""
    step_name, sequences = next(iter(STEPS.items()))
    step = make_step(sequences, 64, 32)
    group = model.num_heads // model.num_kv_heads
    shape = (step.num_tokens, model.num_kv_heads, group + 2, model.head_dim)
    qkv = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    angles = jax.random.uniform(jax.random.key(1), (step.num_tokens, model.head_dim // 2), maxval=6.3)
    rope = RopeTable(jnp.cos(angles), jnp.sin(angles))

    def by_xla(qkv: jax.Array, pages: jax.Array, meta: AttentionMetadata, rope: RopeTable) -> Any:
        q, k, v = split_heads(qkv, rope, None)
        return q, xla.write_kv(pages, k, v, meta)

    for name, write in (("triton", gpu_split.split_and_write), ("xla", by_xla)):

        def write_layers(layers: Any, qkv: Any, meta: Any, rope: Any, write: Any = write) -> Any:
            done = [write(qkv, pages, meta, rope) for pages in layers]
            return [q for q, _ in done], [pages for _, pages in done]

        jitted = jax.jit(write_layers, donate_argnums=0)
        layers = [pages for _, pages in make_data(model, step)]

        def call(jitted: Any = jitted, layers: list[jax.Array] = layers) -> list[jax.Array]:
            queries, layers[:] = jitted(layers, qkv, step.meta, rope)
            return [*queries, *layers]

        seconds = seconds_per_call(call) / NUM_LAYERS
        print(f"{model.name}  {step_name}  split and write, {name:<8} {seconds * 1e3:7.3f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[model.name for model in MODELS], help="default: all")
    parser.add_argument(
        "--page-sizes", type=int, nargs="+", default=[64, 16, 128], help="the first most of all"
    )
    args = parser.parse_args()
    models = tuple(model for model in MODELS if args.model in (None, model.name))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    begin = time.perf_counter()
    choices = make_choices(models, args.page_sizes)
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(compile_choice, choices))
    print(f"{len(choices)} choices compiled in {time.perf_counter() - begin:.0f} s")
    failures = 0
    data: list[tuple[jax.Array, jax.Array]] = []
    shown: tuple[Any, ...] = ()
    for choice, run in zip(choices, compiled, strict=True):
        step, model = choice.step, choice.model
        if shown != (model, choice.step_name, step.page_size):
            shown = (model, choice.step_name, step.page_size)
            data = make_data(model, step)
        line = f"{model.name}  {choice.step_name}  page {step.page_size:<4} {choice.label:<22}"
        if isinstance(run, Exception):
            print(f"{line} does not compile: {str(run).splitlines()[0][:90]}")
            continue
        error = largest_error(choice, run(data, step.meta)[-1], *data[-1])
        if error > TOLERANCE:
            failures += 1
            print(f"{line} WRONG by {error:.3g}")
            continue
        seconds = seconds_per_call(partial(run, data, step.meta)) / NUM_LAYERS
        rate = step.flops(model) / seconds / 1e12
        print(f"{line} {seconds * 1e3:7.3f} ms  {rate:5.0f} TFLOP/s  error {error:.4f}", flush=True)
    for model in models:
        time_writes(model)
    print(f"{time.perf_counter() - begin:.0f} s in all, {failures} wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
