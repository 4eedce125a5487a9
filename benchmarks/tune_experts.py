"""Time the GPU kernels of mixtures of experts: what gpu_experts.tuning_rule says, and its neighbours.

    PYTHONPATH=. python benchmarks/tune_experts.py                          # both models, decode and prefill sizes
    PYTHONPATH=. python benchmarks/tune_experts.py --models qwen3moe --tokens 1,64 --check   # the rule alone

A call runs a chain of layers inside one program, each with experts of its own choice, so that nothing of the host is
timed.  µs are of one layer: plan, gate and up, down, and the sum of the parts.  The floor is the weights of the experts
in use, read once.  Nothing is written: the rule is to be changed by hand.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas import experts, gpu_experts
from jaxserve.kernels_pallas.gpu_experts import ExpertsTuning

READ_RATE = 3.0e12  # bytes per second that an H100 reads from its memory, measured
LAYERS = 8  # of a chain
REPEATS = 5
# Experts, experts a token, D, F; tiny is a rehearsal without a GPU.
MODELS = {"mixtral": (8, 2, 4096, 14336), "qwen3moe": (128, 8, 2048, 768), "tiny": (4, 2, 32, 32)}


@dataclass(frozen=True)
class Inputs:
    """Random tokens, whose weights are the same in all layers, but not the experts that they take."""

    x: jax.Array  # [T, D]
    ids: jax.Array  # [layers, T, C]
    weights: jax.Array  # [T, C]
    gate_up: jax.Array
    down: jax.Array

    @property
    def floor(self) -> float:
        """µs that reading a layer's experts takes, mean."""
        in_use = np.mean([np.unique(layer).size for layer in np.asarray(self.ids)])
        one = 3 * self.down.shape[1] * self.down.shape[2] * self.down.dtype.itemsize
        return float(in_use) * one / READ_RATE * 1e6


def main() -> int:
    """Check, time, print."""
    args = _parse()
    interpret = jax.default_backend() != "gpu"
    if interpret and args.models != ["tiny"]:
        raise SystemExit(f"tune_experts needs a GPU; JAX found {jax.devices()[0].device_kind}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for model in args.models:
        for num_tokens in args.tokens:
            inputs = make_inputs(model, num_tokens)
            _check(inputs, interpret)
            _tune(model, inputs, check_only=args.check, interpret=interpret)
    return 0


def make_inputs(model: str, num_tokens: int) -> Inputs:
    """bfloat16; every token takes different experts, all with equal chances."""
    count, per_token, embed, ffn = MODELS[model]
    keys = jax.random.split(jax.random.key(0), 3)
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((LAYERS, num_tokens, count)), axis=-1)[..., :per_token]

    def normal(key: jax.Array, *shape: int, fan_in: int = 1) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(fan_in**-0.5)

    return Inputs(
        normal(keys[0], num_tokens, embed),
        jnp.asarray(ids, jnp.int32),
        jnp.full((num_tokens, per_token), 1 / per_token),
        normal(keys[1], count, embed, 2 * ffn, fan_in=embed),
        normal(keys[2], count, ffn, embed, fan_in=ffn),
    )


def _tune(model: str, inputs: Inputs, *, check_only: bool, interpret: bool) -> None:
    rule = gpu_experts.tuning_rule(inputs.ids[0].size, inputs.down.shape[0], inputs.x.dtype)
    choices = [rule] if check_only else [rule, *_neighbours(rule)]
    with ThreadPoolExecutor(8) as pool:  # compiling is what takes the time
        calls = list(pool.map(lambda choice: _compile(inputs, choice, interpret), choices))
    times = {
        choice: _time(inputs, call) for choice, call in zip(choices, calls, strict=True) if call is not None
    }
    floor, num_tokens = inputs.floor, inputs.x.shape[0]
    for choice in sorted(times, key=lambda choice: times[choice]):
        mark = " (the rule)" if choice == rule else ""
        print(
            f"{model} {num_tokens:5d} tokens: {times[choice]:9.2f} µs, floor {floor:8.2f} "
            f"({floor / times[choice]:4.0%}) {choice}{mark}",
            flush=True,
        )


def _neighbours(rule: ExpertsTuning) -> Iterator[ExpertsTuning]:
    """Choices that differ from the rule in one number."""
    ranges = {"tile_rows": 128, "hidden_columns": 128, "out_columns": 256, "depth": 256, "num_warps": 8}
    for name, most in ranges.items():
        least = 2 if name == "num_warps" else 16
        for value in (getattr(rule, name) // 2, getattr(rule, name) * 2):
            if least <= value <= most:
                yield replace(rule, **{name: value})
    for stages in (2, 3, 4, 5):
        if stages != rule.num_stages:
            yield replace(rule, num_stages=stages)


def _layer(inputs: Inputs, x: jax.Array, ids: jax.Array, **options: Any) -> jax.Array:
    dtype = x.dtype if x.shape[0] >= 512 else jnp.dtype(jnp.float32)
    parts = gpu_experts.mixture(
        x, ids, inputs.weights, inputs.gate_up, inputs.down, out_dtype=dtype, **options
    )
    return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(x.dtype)


def _compile(inputs: Inputs, choice: ExpertsTuning, interpret: bool) -> Any:
    """The compiled chain, or None where the choice does not fit the device."""

    def chain(
        x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
    ) -> jax.Array:
        layer = partial(_layer, Inputs(x, ids, weights, gate_up, down), tuning=choice, interpret=interpret)
        for own_ids in ids:
            x = layer(x, own_ids)
        return x

    args = inputs.x, inputs.ids, inputs.weights, inputs.gate_up, inputs.down
    try:
        return jax.jit(chain).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:  # too much shared memory
        print(f"    {choice} does not compile: {str(error).splitlines()[0]}", flush=True)
        return None


def _time(inputs: Inputs, call: Any) -> float:
    """µs of one layer, median."""
    samples = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call(inputs.x, inputs.ids, inputs.weights, inputs.gate_up, inputs.down).block_until_ready()
        samples.append(time.perf_counter() - start)
    return float(np.median(samples[1:])) / LAYERS * 1e6


def _check(inputs: Inputs, interpret: bool) -> None:
    """A few tokens against plain operations.  Raises AssertionError where they differ."""
    few = slice(0, min(8, inputs.x.shape[0]))
    x, ids, weights = inputs.x[few], inputs.ids[0, few], inputs.weights[few]
    routing = experts.Routing(ids, weights)
    want = jax.jit(experts.mixture, static_argnums=4)(x, routing, inputs.gate_up, inputs.down, "xla")[0]
    out = _layer(inputs, inputs.x, inputs.ids[0], interpret=interpret)[few]
    np.testing.assert_allclose(np.float32(out), np.float32(want), atol=0.05, rtol=0.05)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=lambda text: text.split(","), default=["mixtral", "qwen3moe"])
    add(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 8, 64, 256, 8192],
        help="tokens of a step (default: 1,8,64,256,8192)",
    )
    add("--check", action="store_true", help="time the rule's choice alone")
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"unknown models {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
