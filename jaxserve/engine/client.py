"""The engine core in this process, on a thread of its own, behind EngineClient."""

from __future__ import annotations

import functools
import gc
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from jaxserve.config import EngineConfig, ImageProcessorConfig, ModelConfig
from jaxserve.engine.building import build_runner, settle_engine
from jaxserve.engine.compiling import CompileGuard
from jaxserve.engine.core import AnyRunner, EngineCore, failure
from jaxserve.engine.encoder_cache import PAGE_ROWS, EncoderCache
from jaxserve.engine.image_planner import ImagePlanner
from jaxserve.engine.pages import PageAllocator
from jaxserve.engine.protocol import (
    CoreRequest,
    EngineInfo,
    EngineStats,
    ImageInfo,
    OnDead,
    OnOutputs,
    TokenOutput,
)
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.settle import Settings
from jaxserve.engine.shared_weights import SharedWeights
from jaxserve.engine.tower_lattice import TowerSettings
from jaxserve.errors import EngineDeadError
from jaxserve.loading.checkpoint import AnyCheckpoint
from jaxserve.structured.compiler import CompiledGrammar, GrammarCompiler

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LAST_SECONDS = 2.0  # for the thread of an engine that has failed, which may never get away from its step


class InProcessClient:
    """EngineClient over an EngineCore in this process.  One thread runs the step loop; others only queue orders."""

    def __init__(
        self,
        core: EngineCore,
        info: EngineInfo,
        *,
        forbid_recompile: bool,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.info = info
        self._grammars = grammars
        self._core = core
        self._guard = CompileGuard(forbid=forbid_recompile)
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._compiling: set[str] = set()  # requests whose grammar is being compiled
        self._error: Exception | None = None
        self._failing = threading.Lock()
        self._on_outputs: OnOutputs
        self._on_dead: OnDead

    def start(self, on_outputs: OnOutputs, on_dead: OnDead) -> None:
        """Start the step loop."""
        self._on_outputs = on_outputs
        self._on_dead = on_dead
        # What was loaded and compiled lives until the end: collections need not look at it again.
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[CoreRequest]) -> None:
        """Queue requests; raises EngineDeadError once the engine cannot go on."""
        if self._error is not None or self._stopping:
            raise EngineDeadError(f"the engine is not running: {self._error or 'it was shut down'}")
        self._orders.put(lambda: self._add(requests))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids are none of our business."""
        self._orders.put(lambda: self._abort(request_ids))

    def stats(self) -> EngineStats:
        """A snapshot; counters of a step that just runs may be a moment old."""
        return self._core.stats(self._guard.count)

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes, between two steps; False while any page is in use."""
        done: Future[bool] = Future()
        self._orders.put(lambda: done.set_result(self._core.reset_prefix_cache()))
        while self._is_running:
            try:
                return done.result(timeout=_POLL_SECONDS)
            except TimeoutError:
                pass  # a step runs, or the engine has ended with the order still queued
        return False

    def shutdown(self) -> None:
        """Stop after the step that runs; what was in flight is dropped."""
        self._stopping = True
        self._orders.put(lambda: None)
        # Its own threads, on which a front end may be collected as garbage, cannot wait for each other.
        if self._thread is not None and not self._guard.is_watching:
            while self._is_running:  # it may fail meanwhile
                self._thread.join(_POLL_SECONDS)
            self._thread.join(_LAST_SECONDS)
            gc.unfreeze()  # a front end and its client refer to each other: weights would never be let go

    def fail(self, error: Exception) -> None:
        """End the engine, from any thread: its own may be waiting for what never comes.  The first error counts."""
        with self._failing:
            if self._error is not None:
                return
            self._error = error
        self._on_dead(error)
        self._orders.put(lambda: None)

    @property
    def _is_running(self) -> bool:
        """Whether the thread takes orders, or will when its step is over; that of an engine which failed may hang."""
        return self._error is None and self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        self._guard.start()
        try:
            self._core.start(self._guard.watch)
            while not self._stopping and self._error is None:
                self._take_orders(wait=not self._core.has_work)
                if self._core.has_work:
                    outputs = self._core.step()
                    if outputs:
                        self._on_outputs(outputs)
        except BaseException as error:  # the loop's own end: every request is told, see docs/architecture.md
            logger.exception("the engine cannot go on")
            # A panic in a native library is no Exception.
            self.fail(error if isinstance(error, Exception) else EngineDeadError(repr(error)))
        finally:
            self._core.stop()
            self._guard.stop()

    def _take_orders(self, *, wait: bool) -> None:
        if wait:
            self._orders.get()()
        while not self._orders.empty():
            self._orders.get()()

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._compiling.discard(request_id)
            self._core.abort(request_id)

    def _add(self, requests: Sequence[CoreRequest]) -> None:
        failures = []
        for request in requests:
            if request.grammar is None or self._grammars is None:
                failures += self._core.add(request)
            else:
                self._compiling.add(request.request_id)
                compiling = self._grammars.compile(request.grammar)
                if compiling.done():
                    failures += self._add_compiled(request, compiling)
                else:
                    compiling.add_done_callback(functools.partial(self._order_compiled, request))
        if failures:
            self._on_outputs(failures)

    def _order_compiled(self, request: CoreRequest, compiling: Future[CompiledGrammar]) -> None:
        """From a thread that compiles: the request can start."""

        def add() -> None:
            if failures := self._add_compiled(request, compiling):
                self._on_outputs(failures)

        self._orders.put(add)

    def _add_compiled(self, request: CoreRequest, compiling: Future[CompiledGrammar]) -> list[TokenOutput]:
        if request.request_id not in self._compiling:
            return []  # it was aborted meanwhile
        self._compiling.remove(request.request_id)
        # It is done: nothing waits here, and what the compiler itself ran into fails this request alone.
        if (error := compiling.exception(timeout=0)) is not None:
            return [failure(request.request_id, error)]
        return self._core.add(request, compiling.result(timeout=0))


def build_client(
    config: EngineConfig,
    checkpoint: AnyCheckpoint | None,
    model: ModelConfig,
    grammars: GrammarCompiler | None = None,
    processor: ImageProcessorConfig | None = None,
) -> InProcessClient:
    """Load the weights and compile every program, with progress on stderr.  The client is not started.

    Without a checkpoint (load_format "dummy") the weights are random.  Without `grammars`, no request may have one.
    A model that sees needs a `processor`.
    Raises ConfigError if the model does not fit, CheckpointError if the weights are not the model's.
    """
    settings, devices = settle_engine(config, model, processor)
    return build_settled(config, checkpoint, settings, devices, grammars)


def build_settled(
    config: EngineConfig,
    checkpoint: AnyCheckpoint | None,
    settings: Settings,
    devices: Sequence[Device],
    grammars: GrammarCompiler | None = None,
    weights: SharedWeights | None = None,
) -> InProcessClient:
    """The same with settings that are made, on these devices; replicas share `weights`, see build_runner."""
    runner = build_runner(config, checkpoint, settings, devices, weights)
    core, info = make_core(config, settings, runner, grammars)
    return InProcessClient(core, info, forbid_recompile=config.forbid_recompile, grammars=grammars)


def make_core(
    config: EngineConfig, settings: Settings, runner: AnyRunner, grammars: GrammarCompiler | None
) -> tuple[EngineCore, EngineInfo]:
    """What plans for a runner, and what it tells of itself."""
    scheduler = Scheduler(
        PageAllocator(settings.memory.num_pages, enable_prefix_caching=config.enable_prefix_caching),
        page_size=settings.page_size,
        max_num_seqs=settings.max_num_seqs,
        token_budget=settings.max_num_batched_tokens,
        scoring_budget=settings.lattice.scoring.num_tokens,
        chunk_rows=settings.lattice.chunk_rows,
        max_model_len=settings.max_model_len,
        images=None if settings.tower is None else _image_planner(settings.tower),
    )
    info = EngineInfo(
        model=config.model,
        vocab_size=settings.model.vocab_size,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        page_size=settings.page_size,
        num_pages=settings.memory.num_pages - 1,
        max_logprobs=settings.max_logprobs,
        dtype=settings.dtype,
        device=settings.device_kind
        if settings.layout.num_devices == 1
        else f"{settings.layout.num_devices} x {settings.device_kind}",
        images=_image_info(settings),
    )
    core = EngineCore(scheduler, runner, grammars, has_slow_calls=settings.layout.num_devices > 1)
    return core, info


def _image_planner(tower: TowerSettings) -> ImagePlanner:
    return ImagePlanner(EncoderCache(tower.cache_rows // PAGE_ROWS), tower.lattice)


def _image_info(settings: Settings) -> ImageInfo | None:
    if settings.tower is None or settings.model.vision is None:
        return None
    return ImageInfo(
        marker_token_ids=settings.model.vision.image_marker_ids,
        image_token_id=settings.model.vision.image_token_id,
        max_image_tokens=settings.tower.lattice.max_image_tokens,
        processor=settings.tower.processor,
    )
