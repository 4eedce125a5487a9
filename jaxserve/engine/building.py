"""From a configuration to an engine's programs and weights on its devices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.books import make_books
from jaxserve.engine.compile_cache import CompileCache, default_folder
from jaxserve.engine.compiling import check_memory, compile_all
from jaxserve.engine.devices import engine_devices
from jaxserve.engine.programs import Program
from jaxserve.engine.runner import Runner
from jaxserve.engine.settle import Settings, layout_of, settle
from jaxserve.engine.shared_weights import SharedWeights
from jaxserve.engine.start_clock import timed
from jaxserve.engine.tower import Tower
from jaxserve.loading.checkpoint import AnyCheckpoint
from jaxserve.loading.weights import load_state
from jaxserve.models.layout import Layout, plan_layout
from jaxserve.models.on_devices import abstract_on_devices, abstract_on_mesh, dummy_on_devices
from jaxserve.models.sharding import abstract_mesh
from jaxserve.models.towers import split_tower

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


def settle_engine(
    config: EngineConfig,
    model: ModelConfig,
    processor: ImageProcessorConfig | None = None,
    devices: Sequence[Device] | None = None,
) -> tuple[Settings, tuple[Device, ...]]:
    """What the engine does, and on which devices: those given, as many as the config says, or the first of all.

    Raises ConfigError if the model does not fit.
    """
    with timed("device and settings"):
        devices = engine_devices(config, devices)
        device_bytes = weights_bytes(model, layout_of(config, model))
        own = [device for device in devices if device.process_index == jax.process_index()]
        return settle(config, model, device_bytes, own, processor), devices


def build_runner(
    config: EngineConfig,
    checkpoint: AnyCheckpoint | None,
    settings: Settings,
    devices: Sequence[Device],
    weights: SharedWeights | None = None,
) -> Runner:
    """Load the weights and compile every program, with progress on stderr.

    Without a checkpoint (load_format "dummy") the weights are random.  Replicas share `weights`, so that one of them
    alone reads the checkpoint, and what is kept of programs, so that one of them alone compiles.  Raises ConfigError if
    memory does not suffice, CheckpointError if the weights are not the model's.
    """
    layout = settings.layout
    with timed("list of programs"):
        # Where nothing else is said arrays are on the first device, and uncommitted: the shortest way into a program.
        # The programs of replicas are alike, so the first one's are not to be of that kind.
        is_alone = weights is None and tuple(devices) == tuple(jax.devices()[:1])
        _, abstract = abstract_on_devices(layout, jnp.dtype(settings.dtype), None if is_alone else devices)
        book, tower_book = make_books(settings, abstract)
        context = _cache_context(settings), is_alone
        cache = CompileCache(default_folder(config.compile_cache_dir), context, devices)

    def read() -> nnx.State:
        if checkpoint is None:
            return dummy_on_devices(abstract, config.seed or 0, layout)
        return load_state(checkpoint, abstract, layout if layout.num_devices > 1 else None)

    def load() -> nnx.State:
        with timed("weights"):
            return read() if weights is None else weights.get(abstract, read)

    state, programs = _load_while_compiling(load, [*book, *(tower_book or ())], cache)
    check_memory(programs, settings.memory)
    with timed("KV pages"):
        state, tower_state = split_tower(state)
        tower = None
        if tower_book is not None and tower_state is not None:
            tower = Tower(settings, tower_book.pack(tower_state), programs, tower_book)
        runner = Runner(settings, book.pack(state), programs, book, tower)
        del state, tower_state
    with timed("first run of every program"):
        runner.warm_up()
    return runner


def _load_while_compiling(
    load: Callable[[], nnx.State], book: Iterable[Program], cache: CompileCache
) -> tuple[nnx.State, dict[str, jax.stages.Compiled]]:
    """Weights and programs: neither needs the other, and loading mostly waits for the disk and the device."""
    given_up = threading.Event()

    def compile_programs() -> dict[str, jax.stages.Compiled]:
        with timed("programs"):
            return compile_all(book, cache, show_progress=True, given_up=given_up)

    with ThreadPoolExecutor(1, "programs") as pool:
        programs = pool.submit(compile_programs)
        try:
            state = load()
        except BaseException:
            given_up.set()
            raise
        return state, programs.result()


def weights_bytes(model: ModelConfig, layout: Layout | None = None) -> int:
    """Bytes of the parameters, or of one device's in a layout, at four bytes a number, without allocating any."""
    layout = layout or plan_layout(model, 1)
    mesh = abstract_mesh(layout.tensor, layout.expert)
    _, abstract = abstract_on_mesh(layout, jnp.dtype(jnp.float32), mesh)
    return sum(4 * prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(abstract))


def _cache_context(settings: Settings) -> object:
    """What programs depend on: the numbers that shape them, and not how much memory there happened to be."""
    return (
        settings.layout,
        settings.dtype,
        settings.kv_dtype,
        settings.page_size,
        settings.max_num_seqs,
        settings.max_logprobs,
        settings.memory.num_pages,
        settings.lattice,
        settings.tower,
    )
