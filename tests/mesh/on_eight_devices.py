"""`python -m tests.mesh.on_eight_devices CASE …`: what engines over pretend devices answer, a JSON line a case.

A case is FAMILY:DEVICES, or FAMILY:DEVICES:experts with expert parallelism, "restart", "seeing" or "shards".
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.engine import core
from jaxserve.engine.books import make_books
from jaxserve.engine.building import settle_engine, weights_bytes
from jaxserve.engine.client import build_client
from jaxserve.engine.compile_cache import CompileCache
from jaxserve.engine.core import EngineCore
from jaxserve.engine.encoder_cache import EncoderCache
from jaxserve.engine.image_planner import ImagePlanner
from jaxserve.engine.pace import Pace
from jaxserve.engine.pages import PageAllocator
from jaxserve.engine.programs import Program, ProgramBook
from jaxserve.engine.protocol import CoreRequest
from jaxserve.engine.runner import Runner
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.settle import settle
from jaxserve.engine.tower import Tower
from jaxserve.engine.vocab_shards import VocabShards
from jaxserve.models.layout import Layout
from jaxserve.models.loading import abstract_model, load_state
from jaxserve.models.on_devices import abstract_on_devices
from jaxserve.models.part import Part
from jaxserve.models.sharding import MODEL_AXES, engine_mesh
from jaxserve.models.towers import split_tower
from tests.engine.tiny_engine import TINY, Collector, request, tiny_config
from tests.mesh.models import MODELS
from tests.models.vision_cases import NUM_GENERATED, PROCESSOR, TURNS, checkpoint


class OnDemand(dict[str, jax.stages.Compiled]):
    """Programs that are compiled when they are first wanted: few of them are."""

    def __init__(self, book: Iterable[Program]) -> None:
        super().__init__()
        self._lower = {program.name: program.lower for program in book}

    def __missing__(self, name: str) -> jax.stages.Compiled:
        self[name] = compiled = self._lower[name]().compile()
        return compiled


def random_weights(abstract: nnx.State, layout: Layout) -> nnx.State:
    """The same numbers for every layout of a model, made without compiling anything."""
    _, whole = abstract_model(layout.config, jnp.dtype(jnp.float32))
    rng = np.random.default_rng(0)
    filled = []
    for (path, parameter), (_, original) in zip(
        nnx.to_flat_state(abstract), nnx.to_flat_state(whole), strict=True
    ):
        value = rng.normal(size=original.shape, scale=0.2).astype(np.float32)
        padded = np.zeros(parameter.shape, np.float32)
        for move in layout.moves(tuple(parameter.get_metadata("axes")), original.shape):
            padded[move.target] = value[move.source]
        filled.append((path, parameter.replace(jax.device_put(padded, parameter.get_value().sharding))))
    return nnx.from_flat_state(filled)


def requests(family: str) -> list[list[CoreRequest]]:
    """What is asked at once: of every family all that a sampler does, then of one what takes more programs."""
    sampled: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 11}
    penalties: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4}
    allowed = [1, 33, 64, 70, 90, 96, 97, 98]
    found = [
        [
            request("greedy", range(3, 14), logprobs=5),
            request(
                "penalties",
                [7, 98, 7, 7, 41],
                **sampled,
                **penalties,
                logit_bias={97: 3.0, 5: -2.0, 40: 1.5},
                logprobs=3,
            ),
            request("allowed", range(60, 80), temperature=1.2, seed=5, allowed_token_ids=allowed),
        ]
    ]
    if family == "qwen3":
        found.append([request("scored", range(20, 35), prompt_logprobs=3)])
    return found


def answers(family: str, num_devices: int, *, expert_parallel: bool) -> dict[str, Any]:
    """By request: tokens, log-probabilities, those of the prompt."""
    model = MODELS[family]
    config = tiny_config(
        "",
        max_num_seqs=3,
        max_num_batched_tokens=64,
        tensor_parallel_size=num_devices,
        enable_expert_parallel=expert_parallel,
    )
    settings = settle(config, model, weights_bytes(model))
    devices = jax.devices()[:num_devices]
    graphdef, abstract = abstract_on_devices(settings.layout, jnp.dtype(settings.dtype), devices)
    book = ProgramBook(settings, graphdef, abstract)
    weights = book.pack(random_weights(abstract, settings.layout))
    runner = Runner(settings, weights, OnDemand(book), book)
    scheduler = Scheduler(
        PageAllocator(settings.memory.num_pages, enable_prefix_caching=True),
        page_size=settings.page_size,
        max_num_seqs=settings.max_num_seqs,
        token_budget=settings.max_num_batched_tokens,
        scoring_budget=settings.lattice.scoring.num_tokens,
        chunk_rows=settings.lattice.chunk_rows,
        max_model_len=settings.max_model_len,
    )
    engine = EngineCore(scheduler, runner)
    found: dict[str, Any] = {}
    for batch in requests(family):
        for each in batch:
            assert not engine.add(each)
            found[each.request_id] = {"tokens": [], "logprobs": [], "prompt_logprobs": []}
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                found[output.request_id]["tokens"] += output.token_ids
                found[output.request_id]["logprobs"] += map(asdict, output.logprobs or [])
                found[output.request_id]["prompt_logprobs"] += map(asdict, output.prompt_logprobs or [])
    return found


def restart() -> dict[str, Any]:
    """A whole engine on the second and third device, started twice, with bursts; the second start compiles nothing."""

    class Hurried(Pace):
        def observe(self, worked: float, waited: float) -> None:
            self.steps = 4

    found: dict[str, Any] = {"tokens": [], "compiles": [], "device": ""}

    def run(folder: str) -> None:
        config = tiny_config(
            folder, max_num_seqs=1, max_num_batched_tokens=16, tensor_parallel_size=2, forbid_recompile=True
        )
        client, collector = build_client(config, None, TINY, devices=jax.devices()[1:3]), Collector()
        client.start(collector.on_outputs, collector.on_dead)
        client.submit([request("a", range(20), max_tokens=12)])
        collector.wait("a")
        client.shutdown()
        assert collector.error is None, collector.error
        found["tokens"].append(collector.tokens("a"))
        found["compiles"].append(client.stats().compiles_after_ready)
        found["device"] = client.info.device

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(core, "Pace", Hurried):
        run(folder)
        with mock.patch.object(CompileCache, "compile", side_effect=AssertionError("compiled again")):
            run(folder)
    return found


def seeing() -> list[int]:
    """What a model that sees says over two devices to a prompt with images, in chunks of 64 tokens."""
    stored, turn = checkpoint("qwen2_5_vl"), TURNS["odd sizes"]
    config = tiny_config("", max_num_seqs=3, max_num_batched_tokens=64, tensor_parallel_size=2)
    settings, devices = settle_engine(config, stored.config, PROCESSOR)
    _, abstract = abstract_on_devices(settings.layout, jnp.dtype("float32"), devices)
    book, tower_book = make_books(settings, abstract)
    language, tower_state = split_tower(load_state(stored, abstract, settings.layout, progress=False))
    assert tower_book is not None
    assert tower_state is not None
    assert settings.tower is not None
    weights = tower_book.pack(tower_state)
    divided = sum(array.nbytes for array in weights if not array.sharding.is_fully_replicated)
    assert divided > sum(array.nbytes for array in weights) / 2, "each device has a share of the tower"
    tower = Tower(settings, weights, OnDemand(tower_book), tower_book)
    scheduler = Scheduler(
        PageAllocator(settings.memory.num_pages, enable_prefix_caching=True),
        page_size=settings.page_size,
        max_num_seqs=settings.max_num_seqs,
        token_budget=settings.max_num_batched_tokens,
        scoring_budget=settings.lattice.scoring.num_tokens,
        max_model_len=settings.max_model_len,
        images=ImagePlanner(EncoderCache(8), settings.tower.lattice),
    )
    engine = EngineCore(scheduler, Runner(settings, book.pack(language), OnDemand(book), book, tower))
    asked = replace(request("seeing", turn.token_ids, max_tokens=NUM_GENERATED), images=turn.images)
    assert not engine.add(asked)
    token_ids: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            token_ids += output.token_ids
    return token_ids


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
    family, num_devices, *parallel = case.split(":")
    return answers(family, int(num_devices), expert_parallel=bool(parallel))


_OTHERS: dict[str, Callable[[], Any]] = {"restart": restart, "seeing": seeing, "shards": shards}


def main() -> None:
    for case in sys.argv[1:]:
        print(json.dumps({"case": case, "answers": answers_of(case)}), flush=True)


if __name__ == "__main__":
    main()
