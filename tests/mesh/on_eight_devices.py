"""`python -m tests.mesh.on_eight_devices CASE …`: what engines over pretend devices answer, a JSON line a case.

A case is FAMILY:DEVICES, FAMILY:DEVICES:experts with expert parallelism, FAMILY:DEVICES:scattered with sequence
parallelism of all steps whose tokens the devices divide, FAMILY:COPIESxDEVICES with replicas, "restart" or "shards".
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxserve.config import EngineConfig, ImageProcessorConfig
from jaxserve.engine import core, settle
from jaxserve.engine.building import settle_engine
from jaxserve.engine.client import build_settled
from jaxserve.engine.compile_cache import CompileCache
from jaxserve.engine.lattice import Lattice, build_lattice
from jaxserve.engine.pace import Pace
from jaxserve.engine.protocol import CoreRequest, TokenOutput
from jaxserve.engine.replicas import build_replicas
from jaxserve.engine.vocab_shards import VocabShards
from jaxserve.models import part
from jaxserve.models.part import Part
from jaxserve.models.sharding import MODEL_AXES, engine_mesh
from tests.engine.tiny_engine import TINY, Collector, request, tiny_config
from tests.mesh.models import SEEING, checkpoint
from tests.models.vision_cases import PROCESSOR, TURNS, Turn

# Four requests at once, of which an engine takes three; a prompt that reaches beyond windows and chunks of 16 tokens.
TEXTS = {
    "greedy": Turn(list(range(3, 14)), ()),
    "penalties": Turn([7, 98, 7, 7, 41], ()),
    "allowed": Turn(list(range(60, 80)), ()),
    "scored": Turn(list(range(20, 35)), ()),
}
PICTURES = {"greedy": TURNS["odd sizes"], "penalties": TURNS["one token"], "scored": TURNS["windows"]}


def requests(family: str) -> list[CoreRequest]:
    """All that a sampler does, and of a family that sees most of it about images."""
    sampled: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 11}
    penalties: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4}
    params: dict[str, dict[str, Any]] = {
        "greedy": {"logprobs": 5},
        "penalties": {
            **sampled,
            **penalties,
            "logit_bias": {97: 3.0, 5: -2.0, 40: 1.5},
            "logprobs": 3,
        },
        "allowed": {"temperature": 1.2, "seed": 5, "allowed_token_ids": [1, 33, 64, 70, 90, 96, 97, 98]},
        "scored": {"prompt_logprobs": 3},
    }
    turns = TEXTS | PICTURES if family in SEEING else TEXTS
    return [
        replace(request(name, turns[name].token_ids, **params[name]), images=turns[name].images)
        for name in params
    ]


def processor(family: str) -> ImageProcessorConfig | None:
    """How images are prepared for a family that sees."""
    return PROCESSOR if family in SEEING else None


def few_shapes(**options: Any) -> Lattice:
    """Only the largest buckets, which do for every step: compiling is most of the time."""
    lattice = build_lattice(**options)
    return replace(
        lattice,
        forwards=tuple(shape for shape in lattice.forwards if shape.num_rows > 1),
        samples=tuple(shape for shape in lattice.samples if shape.num_rows > 1),
    )


def engine_config(cache_dir: str = "", **options: Any) -> EngineConfig:
    """Of an engine that answers `requests`."""
    return tiny_config(
        cache_dir,
        max_model_len=128,
        max_num_seqs=3,
        max_num_batched_tokens=16,
        forbid_recompile=True,
        **options,
    )


def answers(family: str, config: EngineConfig) -> dict[str, Any]:
    """What a whole engine, or several, say to each request: tokens, log-probabilities, those of the prompt."""
    stored, asked = checkpoint(family), requests(family)
    collector, engines = Collector(), set[int]()

    def on_outputs(batch: Sequence[TokenOutput]) -> None:
        engines.add(threading.get_ident())
        collector.on_outputs(batch)

    with mock.patch.object(settle, "build_lattice", few_shapes):
        client = build_replicas(config, stored, stored.config, processor=processor(family))
    client.start(on_outputs, collector.on_dead)
    try:
        client.submit(asked)
        collector.wait(*(each.request_id for each in asked))
    finally:
        client.shutdown()
    assert collector.error is None, collector.error
    found: dict[str, Any] = {}
    for name, outputs in collector.outputs.items():
        assert all(output.error is None for output in outputs), outputs
        found[name] = {
            "tokens": collector.tokens(name),
            "logprobs": [asdict(one) for output in outputs for one in output.logprobs or ()],
            "prompt_logprobs": [asdict(one) for output in outputs for one in output.prompt_logprobs or ()],
        }
    return {"requests": found, "num_engines": len(engines), "device": client.info.device}


def restart() -> dict[str, Any]:
    """A whole engine with bursts on two devices, started on them again and on two others: the first start compiles."""

    class Hurried(Pace):
        def observe(self, num_steps: int, worked: float, waited: float, *, is_single: bool) -> None:
            self.steps = 4

    found: dict[str, Any] = {"tokens": [], "compiles": [], "device": ""}

    def run(folder: str, devices: Sequence[Any]) -> None:
        config = tiny_config(
            folder, max_num_seqs=1, max_num_batched_tokens=16, tensor_parallel_size=2, forbid_recompile=True
        )
        settings, devices = settle_engine(config, TINY, devices=devices)
        client, collector = build_settled(config, None, settings, devices), Collector()
        client.start(collector.on_outputs, collector.on_dead)
        client.submit([request("a", range(20), max_tokens=12)])
        collector.wait("a")
        client.shutdown()
        assert collector.error is None, collector.error
        found["tokens"].append(collector.tokens("a"))
        found["compiles"].append(client.stats().compiles_after_ready)
        found["device"] = client.info.device

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(core, "Pace", Hurried):
        own, others = jax.devices()[1:3], jax.devices()[6:4:-1]
        run(folder, own)
        with mock.patch.object(CompileCache, "compile", side_effect=AssertionError("compiled again")):
            run(folder, own)
            run(folder, others)
    return found


def shards() -> dict[str, Any]:
    """Rows of 99 logits with ties, nothing but -inf, and signed zeros, over four devices."""
    count, width = 4, 32
    x = np.random.default_rng(0).integers(-3, 3, (5, 99)).astype(np.float32)
    x[1], x[2, 40:] = -np.inf, 5
    x[3] = np.where(np.arange(99) % 2, 0.0, -0.0)
    padded = np.pad(x, ((0, 0), (0, count * width - 99)), constant_values=7)  # larger than any that exists
    vocabulary = VocabShards(Part(count), 99, width)

    def run(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = vocabulary.without_padding(logits)
        return vocabulary.argmax(logits, on_cpu=True), vocabulary.gather(vocabulary.whole_rows(logits), 5)

    spread = jax.shard_map(
        run,
        mesh=engine_mesh(jax.devices()[:count], count, 1),
        in_specs=PartitionSpec(None, MODEL_AXES),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    ids, rows = jax.jit(spread)(padded)
    return {"found": ids.tolist(), "wanted": x.argmax(1).tolist(), "same": np.array_equal(rows, x)}


def answers_of(case: str) -> Any:
    if case in _OTHERS:
        return _OTHERS[case]()
    family, devices, *kinds = case.split(":")
    copies, _, num_devices = devices.rpartition("x")
    config = engine_config(
        data_parallel_size=int(copies or 1),
        tensor_parallel_size=int(num_devices),
        enable_expert_parallel="experts" in kinds,
    )
    scatters = "scattered" in kinds
    with mock.patch.object(part, "SCATTERED_TOKENS", 1 if scatters else part.SCATTERED_TOKENS):
        # Tokens of the steps that few_shapes leaves.
        sizes = config.max_num_seqs, config.max_num_batched_tokens
        assert any(size and Part(int(num_devices)).scatters(size) for size in sizes) == scatters
        return answers(family, config)


_OTHERS: dict[str, Callable[[], Any]] = {"restart": restart, "shards": shards}


def main() -> None:
    for case in sys.argv[1:]:
        print(json.dumps({"case": case, "answers": answers_of(case)}), flush=True)


if __name__ == "__main__":
    main()
