"""The asynchronous front end: many requests on one event loop, answers streamed as the engine gives them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from jaxserve.admission import Admission
from jaxserve.assembly import assemble
from jaxserve.errors import EngineDeadError, QueueFullError, RequestError, ShuttingDownError, copied
from jaxserve.inputs import AnyPrompt, ChatOptions, TokenizedPrompt, check_characters, encode_texts
from jaxserve.output_processor import OutputProcessor
from jaxserve.request_stream import Inbox, RequestStream

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.engine.protocol import EngineClient, EngineInfo, EngineStats, TokenOutput
    from jaxserve.loading.checkpoint import GenerationDefaults
    from jaxserve.media.patches import ProcessedImage
    from jaxserve.media.policy import MediaPolicy
    from jaxserve.observer import Observer
    from jaxserve.sampling_params import SamplingParams
    from jaxserve.structured.compiler import GrammarCompiler
    from jaxserve.structured_outputs import StructuredOutputsParams
    from jaxserve.text.chat_template import ChatTemplate
    from jaxserve.text.tokenizer import Tokenizer

T = TypeVar("T")

LONG_TEXT = 8192  # characters beyond which tokenizing would hold up the event loop (about 2 ms)
HUGE_TEXT = 2**20  # characters beyond which it may take seconds and hundreds of megabytes
MAX_TEXT = (
    4 * 2**20
)  # characters that are tokenized though they need not fit into the model's context, if it is short


class AsyncLLM:
    """A started engine and the requests in flight.

    All methods but `shutdown` and the properties are called on one event loop's thread: the loop of the first
    `generate`, or a later one once nothing is in flight any more.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        *,
        seed: int | None = None,
        max_num_queued_reqs: int | None = None,
        grammars: GrammarCompiler | None = None,
        media: MediaPolicy | None = None,
    ) -> None:
        """Takes an unstarted client and starts it.

        `seed` draws the seeds of requests without one; `max_num_queued_reqs` is how many sequences may wait
        for the engine before new requests are refused; `grammars` is the compiler of an engine in this process;
        `media` says which images a model that takes them may be sent.
        """
        self._client = client
        self._admission = Admission(client.info, tokenizer, defaults, seed, grammars, media)
        self._max_num_queued_reqs = max_num_queued_reqs
        self._processor = OutputProcessor()
        self._inboxes: dict[str, Inbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._huge_texts = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-huge-texts")
        self._error: Exception | None = None
        self._is_draining = False
        self._is_shut_down = False
        self._idle = asyncio.Event()  # set while nothing is in flight
        self._idle.set()
        client.start(self._on_outputs, self._on_dead)

    @classmethod
    def from_engine_config(
        cls, config: EngineConfig, check: Callable[[Tokenizer], None] | None = None
    ) -> AsyncLLM:
        """Load the model of `config` into an engine in this process.  Blocks while it loads and compiles.

        `check` sees the tokenizer before that; what it raises ends this.
        """
        parts = assemble(config, check)
        return cls(
            parts.client,
            parts.tokenizer,
            parts.defaults,
            seed=config.seed,
            max_num_queued_reqs=config.max_num_queued_reqs,
            grammars=parts.grammars,
            media=parts.media,
        )

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        return self._client.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._admission.tokenizer

    @property
    def defaults(self) -> GenerationDefaults:
        """What applies to requests that are silent, and the operator's limit on the length of answers."""
        return self._admission.defaults

    @property
    def max_text(self) -> int:
        """Characters of a text that is tokenized though it need not fit into the model's context."""
        return max(MAX_TEXT, 16 * self.info.max_model_len)

    @property
    def error(self) -> Exception | None:
        """What the engine died of."""
        return self._error

    @property
    def is_dead(self) -> bool:
        """Whether the engine can no longer answer."""
        return self._error is not None

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the front end is going down."""
        return self._is_draining

    @property
    def num_in_flight(self) -> int:
        """Requests submitted and not ended."""
        return len(self._processor)

    def observe(self, observer: Observer) -> None:
        """Let `observer` hear how answers come along, on the event loop's thread, in place of the one before it."""
        self._processor.observer = observer

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._client.stats()

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False when pages are in use."""
        return await asyncio.to_thread(self._client.reset_prefix_cache)  # waits for the step that runs

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json), and `overrides` over them."""
        return self._admission.default_sampling_params(**overrides)

    def render_chat(self, messages: Sequence[Any], **options: Unpack[ChatOptions]) -> TokenizedPrompt:
        """The prompt of a conversation, for `generate`; may be called on any thread, as for a long one it should.

        Images should have been loaded before, with load_images, for else this thread waits for them.

        Raises RequestError naming the field at fault.
        """
        return self._admission.render_chat(messages, **options)

    async def load_images(
        self, messages: Sequence[Any], mm_processor_kwargs: Mapping[str, Any] | None = None
    ) -> list[ProcessedImage]:
        """The images of a conversation, for render_chat: fetched, decoded and cut up on other threads.

        Refuses at once, before anything is fetched, where `generate` would refuse for being full or going down.
        Raises RequestError naming the image at fault, or mm_processor_kwargs; QueueFullError before anything is decoded
        where the images of requests that wait have as many bytes as they may.
        """
        sources = self._admission.image_sources(messages, mm_processor_kwargs)
        images = self._admission.images
        if images is None:
            return []
        if sources:
            self._check_open()
        return await images.loader.load(sources, mm_processor_kwargs, is_queued=True)

    async def prepare(self, prompt: AnyPrompt) -> TokenizedPrompt:
        """A prompt for `generate`, its text tokenized and its images (multi_modal_data) loaded on other threads.

        Raises RequestError naming the field.
        """
        return await asyncio.to_thread(self._admission.prepare, prompt)

    def chat_template(
        self, source: str | None = None, content_format: str = "auto", *, has_tools: bool = False
    ) -> ChatTemplate | None:
        """The compiled chat template that `render_chat` uses for the same arguments; None: the model has none.

        Raises RequestError for a broken one.
        """
        return self._admission.chat_template(source, content_format, has_tools=has_tools)

    async def check_structured(self, constraint: StructuredOutputsParams | None) -> None:
        """Compile a constraint on another thread and keep it, so that the `generate` that follows is cheap.

        Raises RequestError naming the constraint's param and the part of it that is wrong, too large or too slow.
        """
        if constraint is None:
            return
        checking = asyncio.wrap_future(self._admission.check_structured(constraint))
        try:
            # wait_for of 3.11 loses cancellations.
            async with asyncio.timeout(self._admission.grammars.time_limit):
                refusal = await checking
        except TimeoutError:
            raise self._admission.grammars.too_slow(constraint) from None
        if refusal is not None:
            raise copied(refusal)

    async def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of a text of any length; a long one is tokenized on another thread.

        Raises RequestError naming `param` for a text that is not valid Unicode, or is out of all proportion.
        """
        (ids,) = await self.encode_batch(
            [text], add_special_tokens=add_special_tokens, param=param, must_fit=False
        )
        return ids

    async def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        param: str = "prompt",
        must_fit: bool = True,
    ) -> list[list[int]]:
        """Token ids of each text; if they are long together, they are tokenized on other threads.

        Raises RequestError as `encode` does; if they `must_fit`, ContextLengthError for one that leaves no room for an
        answer, mostly before it is tokenized.
        """
        if not must_fit:
            check_characters(texts, self.max_text, param=param)
        num_characters = sum(map(len, texts))
        limit = self.info.max_model_len if must_fit else None

        def encoded() -> list[list[int]]:
            return encode_texts(texts, self.tokenizer, limit, add_special_tokens, param=param)

        if num_characters > LONG_TEXT:
            # Several are tokenized on all cores: more than one huge batch at a time takes memory and saves no time.
            return await self.on_thread(encoded, num_characters, is_bounded=must_fit and len(texts) == 1)
        return encoded()

    async def on_thread(self, work: Callable[[], T], num_characters: int, *, is_bounded: bool) -> T:
        """Do what takes long for texts of this size on another thread.

        Huge ones whose tokens the model's context does not bound go one at a time, and keep nobody else waiting.
        """
        if is_bounded or num_characters <= HUGE_TEXT:
            return await asyncio.to_thread(work)
        return await asyncio.get_running_loop().run_in_executor(self._huge_texts, work)

    def generate(
        self,
        prompt: AnyPrompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> RequestStream:
        """Submit a request now; iterate over the result for its outputs (see RequestStream for how it ends).

        A prompt with images comes from render_chat or `prepare`.

        Refuses at once, before anything is submitted: RequestError (names the field), QueueFullError,
        ShuttingDownError, EngineDeadError.  While iterating: EngineDeadError, RequestFailedError.
        """
        loop = self._bind_loop()
        self._check_open()
        if isinstance(prompt, Mapping) and prompt.get("multi_modal_data"):
            raise RequestError(
                "multi_modal_data would hold up the event loop: pass what `await prepare(prompt)` gives.",
                param="multi_modal_data",
            )
        request_id = request_id or uuid.uuid4().hex
        state = self._admission.admit(
            request_id, prompt, sampling_params, priority=priority, cache_salt=cache_salt
        )
        self._processor.add(state)
        inbox = self._inboxes[request_id] = Inbox(state, loop)
        self._idle.clear()
        try:
            self._client.submit(state.core_requests)
        except BaseException:
            self._forget(request_id)
            raise
        return RequestStream(inbox, loop, self._drop)

    def abort(self, request_id: str) -> bool:
        """End a request: its reader gets a last output, finish_reason "abort".  False if not in flight."""
        inbox = self._inboxes.get(request_id)
        if inbox is None:
            return False
        self._drop(inbox)
        inbox.state.abort()
        inbox.wake()
        return True

    async def drain(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # a limit, not a failure
        """Refuse new requests, wait up to `timeout` seconds for those in flight, then abort the rest."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            for request_id in list(self._inboxes):
                self.abort(request_id)

    def shutdown(self) -> None:
        """Stop the engine.  Readers still waiting get EngineDeadError.  Shutting down twice is fine."""
        if self._is_shut_down:
            return
        self._is_shut_down = self._is_draining = True
        self._client.shutdown()
        self._huge_texts.shutdown(wait=False)
        self._call_on_loop(self._fail_all, EngineDeadError("the engine was shut down"))

    def _bind_loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, which all requests in flight must share."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and self._loop.is_closed():
                for request_id in list(self._inboxes):  # their readers went with their loop
                    self._drop(self._inboxes[request_id])
            if self._inboxes:
                raise RuntimeError("AsyncLLM has requests in flight on another event loop; use one at a time")
            self._loop = loop
            self._idle = asyncio.Event()  # an Event belongs to the loop that first waits on it
        return loop

    def _check_open(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"the engine is dead: {self._error}") from self._error
        if self._is_draining:
            raise ShuttingDownError("the server is shutting down and takes no new requests")
        limit = self._max_num_queued_reqs
        if limit is None:
            return
        # What the engine reports lags behind what was submitted in this turn of the loop, so both are asked.
        beyond_running = self._processor.num_sequences - self.info.max_num_seqs
        num_waiting = max(beyond_running, self._client.stats().num_waiting)
        if num_waiting >= limit:
            raise QueueFullError(
                f"{num_waiting} requests are waiting and max_num_queued_reqs is {limit}; try again later"
            )

    def _drop(self, inbox: Inbox) -> None:
        """Forget a request and tell the engine to stop working on it."""
        request_id = inbox.state.request_id
        if self._inboxes.get(request_id) is not inbox:
            return  # it has ended, and its id may be in use again
        running = self._forget(request_id)
        if running and self._error is None:
            self._client.abort(running)

    def _forget(self, request_id: str) -> list[str]:
        """Take a request out of the registry; the core requests of it that were still running."""
        self._inboxes.pop(request_id, None)
        if not self._inboxes:
            self._idle.set()
        return self._processor.drop(request_id)

    def _on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        """From the client's thread: one wake-up of the loop for a whole step's outputs."""
        self._call_on_loop(self._deliver, outputs)

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        changed, aborts = self._processor.process(outputs)
        if aborts:
            self._client.abort(aborts)
        for state in changed:
            inbox = self._inboxes[state.request_id]
            inbox.wake()
            if state.is_finished or state.error is not None:
                self._forget(state.request_id)

    def _on_dead(self, error: Exception) -> None:
        """From the client's thread: the engine cannot go on."""
        self._error = error
        self._call_on_loop(self._fail_all, error)

    def _fail_all(self, error: Exception) -> None:
        for request_id, inbox in list(self._inboxes.items()):
            dead = EngineDeadError(f"the engine died: {error}")
            dead.__cause__ = error
            self._forget(request_id)
            inbox.fail(dead)

    def _call_on_loop(self, function: Callable[[T], None], argument: T) -> None:
        """Run on the loop's thread; when the loop is gone, so is everybody who could listen."""
        loop = self._loop  # another one may be put there meanwhile, once this one is closed
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            if not loop.is_closed():
                raise
