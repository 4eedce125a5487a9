"""Mixtures of experts on NVIDIA GPUs, written in Pallas for Triton: four launches between the router and the sum.

Tokens are not sorted.  A tile is a few rows of one expert, a row being one of a token's choices; its rows are
gathered where they lie, and what they give goes to its token's place again.  Every tile has as many rows as
any other: those past its expert's last one repeat it, and write the same once more.

With few tokens the time goes into reading the weights of the experts that are in use, each once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

_MIN_TILE = 16  # rows, columns and depth of the smallest matrix product that the tensor cores take
# Tiles whose programs run side by side, so that they share weights and rows in the second-level cache.
_TILES_TOGETHER = 8
_FEW_ROWS = 4096  # up to which every program of `plan` counts the rows of all experts by itself


@dataclass(frozen=True, slots=True)
class ExpertsTuning:
    """How the products are cut.  All powers of two, and at least 16 but for the last two."""

    tile_rows: int  # rows of a tile
    hidden_columns: int  # of gate times up that a program computes
    out_columns: int  # of the output that a program computes
    depth: int  # inputs that it reads at a time
    num_warps: int
    num_stages: int  # depths under way at once


def tuning_rule(num_rows: int, num_experts: int, dtype: jax.typing.DTypeLike) -> ExpertsTuning:
    """By the rows that an expert has on average: small tiles where weights are what is read, else large ones."""
    tile_rows = pl.next_power_of_2(pl.cdiv(2 * num_rows, num_experts))
    if jnp.dtype(dtype).itemsize > 2:  # multiplied without tensor cores, in true float32
        return ExpertsTuning(min(max(tile_rows, 16), 32), 32, 64, 32, num_warps=4, num_stages=2)
    if tile_rows <= 32:
        return ExpertsTuning(max(tile_rows, 16), 32, 64, 128, num_warps=4, num_stages=4)
    if tile_rows <= 64:
        return ExpertsTuning(64, 64, 128, 64, num_warps=4, num_stages=4)
    return ExpertsTuning(128, 64, 128, 64, num_warps=8, num_stages=3)


def supports(embed: int, ffn: int) -> bool:
    """Whether weights of these sizes can be cut into tiles."""
    return embed % _MIN_TILE == 0 and ffn % _MIN_TILE == 0


class Tiles(NamedTuple):
    """Which rows are computed together: NT tiles, of which the first are in use, and one that is nobody's."""

    experts: jax.Array  # [NT + 1] int32: of each tile; E is nobody, E + 1 that the tile is not in use
    rows: jax.Array  # [NT + 1, rows of a tile] int32: row i is choice i % C of token i // C


@partial(jax.jit, static_argnames=("num_per_token", "renormalize", "interpret"))
def route(
    logits: jax.Array,
    is_live: jax.Array,
    num_per_token: int,
    *,
    renormalize: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """experts.route of logits [T, E] float32 and is_live [T] int32: ids and weights, [T, C]."""
    num_tokens, num_experts = logits.shape
    shape = (num_tokens, num_per_token)
    lanes = pl.next_power_of_2(num_experts)
    return pl.pallas_call(
        partial(_route_kernel, num_per_token=num_per_token, lanes=lanes, renormalize=renormalize),
        grid=(num_tokens,),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        compiler_params=pltriton.CompilerParams(num_warps=max(1, min(lanes // 128, 8)), num_stages=1),
        interpret=interpret,
        name="route",
    )(logits, is_live)


def _route_kernel(
    logits_ref: Any,
    is_live_ref: Any,
    ids_ref: Any,
    weights_ref: Any,
    *,
    num_per_token: int,
    lanes: int,
    renormalize: bool,
) -> None:
    """Program (token)."""
    token = pl.program_id(0)
    num_experts = logits_ref.shape[1]
    expert = jnp.arange(lanes, dtype=jnp.int32)
    logits = pltriton.load(logits_ref.at[token, expert], mask=expert < num_experts, other=-jnp.inf)
    exps = jnp.exp(logits - jnp.max(logits, axis=0))
    left = probabilities = exps / jnp.sum(exps, axis=0)
    nobody = is_live_ref[token] == 0
    chosen = []
    for _ in range(num_per_token):
        # The first of equal ones.  Lanes past the last expert have probability 0, too, but come later.
        best = jnp.min(jnp.where(left == jnp.max(left, axis=0), expert, lanes), axis=0)
        chosen.append((best, jnp.sum(jnp.where(expert == best, probabilities, 0.0), axis=0)))
        left = jnp.where(expert == best, -1.0, left)
    total = sum(weight for _, weight in chosen) if renormalize else 1.0
    for choice, (best, weight) in enumerate(chosen):
        ids_ref[token, choice] = jnp.where(nobody, num_experts, best)
        weights_ref[token, choice] = weight / total


@partial(jax.jit, static_argnames=("num_experts", "tile_rows", "interpret"))
def plan(ids: jax.Array, num_experts: int, tile_rows: int, *, interpret: bool = False) -> Tiles:
    """Tiles for rows whose experts are ids [M]; each expert's rows in order."""
    num_rows, num_groups = ids.shape[0], num_experts + 1
    most = min(
        num_groups, num_rows
    )  # groups that have rows: one in each, at worst, and the others in whole tiles
    num_tiles = most + (num_rows - most) // tile_rows
    num_tiles = pl.cdiv(num_tiles, _tiles_together(num_tiles)) * _tiles_together(num_tiles)
    is_few = num_rows <= _FEW_ROWS
    args = [ids]
    if not is_few:
        ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
        args.append(jnp.sum(ids[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32))
    experts, rows = pl.pallas_call(
        partial(_plan_kernel, num_experts=num_experts, chunk=512 if is_few else 2048),
        grid=(num_groups,),
        out_shape=[
            jax.ShapeDtypeStruct((num_tiles + 1,), jnp.int32),
            jax.ShapeDtypeStruct((num_tiles + 1, tile_rows), jnp.int32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=4 if is_few else 8, num_stages=1),
        interpret=interpret,
        name="plan_experts",
    )(*args)
    return Tiles(experts, rows)


def _plan_kernel(ids_ref: Any, *refs: Any, num_experts: int, chunk: int) -> None:
    """Program (expert): its tiles lie behind those of the experts before it.  refs: sizes if given, the results."""
    *sizes_ref, experts_ref, rows_ref = refs
    expert = pl.program_id(0)
    (num_rows,), (num_tiles, tile_rows) = ids_ref.shape, rows_ref.shape
    spare = num_tiles - 1  # takes what masked lanes write where masks are emulated
    chunk = min(chunk, max(pl.next_power_of_2(num_rows), _MIN_TILE))
    num_chunks = pl.cdiv(num_rows, chunk)
    lanes = jnp.arange(chunk, dtype=jnp.int32)
    digits = jnp.arange(_MIN_TILE, dtype=jnp.int32)

    def load(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Some rows and their experts; lanes that are no rows have -1, whom nobody counts."""
        rows = index * chunk + lanes
        ids = pltriton.load(ids_ref.at[rows], mask=rows < num_rows, other=0)
        ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
        return rows, jnp.where(rows < num_rows, ids, -1)

    num_high_digits = max(pl.next_power_of_2(num_experts // _MIN_TILE + 1), _MIN_TILE)
    numbers = jnp.arange(num_high_digits * _MIN_TILE, dtype=jnp.int32)
    if sizes_ref:
        sizes = pltriton.load(sizes_ref[0].at[numbers], mask=numbers <= num_experts, other=0)
    else:
        # By the two digits of an expert's number: a matrix product is the shortest way to a histogram.
        high_digits = jnp.arange(num_high_digits, dtype=jnp.int32)

        def count(index: jax.Array, counts: jax.Array) -> jax.Array:
            _, ids = load(index)
            highs = (ids[None, :] >> 4) == high_digits[:, None]
            lows = (ids[:, None] & 15) == digits[None, :]
            return counts + _dot(highs.astype(jnp.float16), lows.astype(jnp.float16))

        zeros = jnp.zeros((num_high_digits, _MIN_TILE), jnp.float32)
        sizes = lax.fori_loop(0, num_chunks, count, zeros).astype(jnp.int32).reshape(-1)
    first = jnp.sum(jnp.where(numbers < expert, pl.cdiv(sizes, tile_rows), 0))
    size = jnp.sum(jnp.where(numbers == expert, sizes, 0))
    behind = first + pl.cdiv(size, tile_rows)

    def place(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        num_placed, _ = carry
        rows, ids = load(index)
        is_own = ids == expert
        ranks = num_placed + jnp.cumsum(is_own.astype(jnp.int32)) - 1
        tiles = jnp.where(is_own, first + ranks // tile_rows, spare)
        pltriton.store(rows_ref.at[tiles, ranks % tile_rows], rows, mask=is_own)
        last = jnp.maximum(carry[1], jnp.max(jnp.where(is_own, rows, 0)))
        return num_placed + jnp.sum(is_own.astype(jnp.int32)), last

    _, last_row = lax.fori_loop(0, num_chunks, place, (jnp.int32(0), jnp.int32(0)))

    slots = jnp.arange(tile_rows, dtype=jnp.int32)
    is_free = (first * tile_rows + size <= (behind - 1) * tile_rows + slots) & (size > 0)
    tiles = jnp.where(is_free, behind - 1, spare)
    pltriton.store(rows_ref.at[tiles, slots], jnp.zeros_like(slots) + last_row, mask=is_free)

    def mark(begin: jax.Array, end: jax.Array, value: Any) -> None:
        def body(index: jax.Array, _: None) -> None:
            tiles = begin + index * _MIN_TILE + digits
            at = jnp.where(tiles < end, tiles, spare)
            pltriton.store(experts_ref.at[at], jnp.zeros_like(tiles) + value, mask=tiles < end)

        lax.fori_loop(0, pl.cdiv(end - begin, _MIN_TILE), body, None)

    mark(first, behind, expert)

    @pl.when(expert == num_experts)
    def _rest() -> None:
        mark(behind, jnp.int32(num_tiles), num_experts + 1)


@partial(jax.jit, static_argnames=("out_dtype", "tuning", "interpret"))
def mixture(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    out_dtype: jnp.dtype,
    tuning: ExpertsTuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """experts.mixture of x [T, D] with ids and weights [T, C]: parts [C, T, D] of out_dtype, one for each choice.

    Products are accumulated in float32; what goes from gate and up into down is rounded to x's dtype.
    """
    num_tokens, per_token = ids.shape
    num_experts, ffn, embed = down.shape
    tuning = tuning or tuning_rule(ids.size, num_experts, x.dtype)
    tiles = plan(ids.reshape(-1), num_experts, tuning.tile_rows, interpret=interpret)
    num_tiles = tiles.experts.shape[0] - 1
    params = pltriton.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages)
    columns = _largest_divisor(ffn, tuning.hidden_columns)
    hidden = pl.pallas_call(
        partial(
            _hidden_kernel, per_token=per_token, columns=columns, depth=_largest_divisor(embed, tuning.depth)
        ),
        grid=(num_tiles * (ffn // columns),),
        out_shape=jax.ShapeDtypeStruct((num_tiles, tuning.tile_rows, ffn), x.dtype),
        compiler_params=params,
        interpret=interpret,
        name="experts_hidden",
    )(tiles.experts, tiles.rows, x, gate_up)
    columns = _largest_divisor(embed, tuning.out_columns)
    return pl.pallas_call(
        partial(_out_kernel, columns=columns, depth=_largest_divisor(ffn, tuning.depth)),
        grid=(num_tiles * (embed // columns),),
        out_shape=jax.ShapeDtypeStruct((per_token, num_tokens, embed), out_dtype),
        compiler_params=params,
        interpret=interpret,
        name="experts_out",
    )(tiles.experts, tiles.rows, hidden, down, weights)


def _hidden_kernel(
    experts_ref: Any,
    rows_ref: Any,
    x_ref: Any,
    gate_up_ref: Any,
    hidden_ref: Any,
    *,
    per_token: int,
    columns: int,
    depth: int,
) -> None:
    """Some columns of one tile: silu(gate) * up."""
    num_tiles, tile_rows, ffn = hidden_ref.shape
    num_experts, embed, _ = gate_up_ref.shape
    tile, part = _place_of_program(num_tiles, ffn // columns)
    expert = experts_ref[tile]

    @pl.when(expert < num_experts)
    def _compute() -> None:
        tokens = rows_ref[tile, :] // per_token
        pairs = pl.ds(part * 2 * columns, 2 * columns)

        def body(index: jax.Array, total: jax.Array) -> jax.Array:
            inputs = pl.ds(index * depth, depth)
            return total + _dot(x_ref[tokens, inputs], gate_up_ref[expert, inputs, pairs])

        total = lax.fori_loop(
            0, embed // depth, body, jnp.zeros((tile_rows, 2 * columns), jnp.float32)
        ).reshape(tile_rows, columns, 2)
        is_up = lax.broadcasted_iota(jnp.int32, total.shape, 2) == 1
        gate, up = (jnp.sum(jnp.where(is_up == which, total, 0.0), axis=2) for which in (False, True))
        hidden = gate / (1.0 + jnp.exp(-gate)) * up
        hidden_ref[tile, :, pl.ds(part * columns, columns)] = hidden.astype(hidden_ref.dtype)


def _out_kernel(
    experts_ref: Any,
    rows_ref: Any,
    hidden_ref: Any,
    down_ref: Any,
    weights_ref: Any,
    out_ref: Any,
    *,
    columns: int,
    depth: int,
) -> None:
    """Some columns of one tile, each row at its token's place among the parts of its choice."""
    num_tiles, tile_rows, ffn = hidden_ref.shape
    num_experts, per_token, embed = down_ref.shape[0], out_ref.shape[0], out_ref.shape[2]
    tile, part = _place_of_program(num_tiles, embed // columns)
    expert = experts_ref[tile]
    where = pl.ds(part * columns, columns)

    def store(values: jax.Array, rows: jax.Array) -> None:
        out_ref[rows % per_token, rows // per_token, where] = values.astype(out_ref.dtype)

    @pl.when(expert < num_experts)
    def _compute() -> None:
        def body(index: jax.Array, total: jax.Array) -> jax.Array:
            inputs = pl.ds(index * depth, depth)
            return total + _dot(hidden_ref[tile, :, inputs], down_ref[expert, inputs, where])

        total = lax.fori_loop(0, ffn // depth, body, jnp.zeros((tile_rows, columns), jnp.float32))
        rows = rows_ref[tile, :]
        store(total * weights_ref[rows // per_token, rows % per_token][:, None], rows)

    @pl.when(expert == num_experts)
    def _clear() -> None:
        store(jnp.zeros((tile_rows, columns), jnp.float32), rows_ref[tile, :])


def _place_of_program(num_tiles: int, num_parts: int) -> tuple[Any, Any]:
    """Tile and part of its columns.  Tiles go together, all with one part and then with the next."""
    together = _tiles_together(num_tiles)
    index = pl.program_id(0)
    within = index % (together * num_parts)
    return index // (together * num_parts) * together + within % together, within // together


def _tiles_together(num_tiles: int) -> int:
    return min(pl.next_power_of_2(num_tiles), _TILES_TOGETHER)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Accumulated in float32; operands count as they are, where tf32 would be the default for float32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _largest_divisor(size: int, most: int) -> int:
    """The largest power of two up to `most`, itself one, that divides `size`."""
    return min(most, size & -size)
