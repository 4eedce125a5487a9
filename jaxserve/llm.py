"""The synchronous front end: a list of prompts in, a list of answers out."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

from jaxserve.admission import Admission
from jaxserve.assembly import EngineParts, assemble
from jaxserve.engine_options import engine_config
from jaxserve.errors import EngineDeadError, RequestError, copied
from jaxserve.inputs import AnyPrompt, ChatOptions, TokenizedPrompt, prompt_list, tokenize_texts
from jaxserve.output_processor import OutputProcessor
from jaxserve.progress import TokenBar
from jaxserve.request_state import RequestState
from jaxserve.sampling_params import OutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.protocol import EngineInfo, EngineStats, TokenOutput
    from jaxserve.outputs import RequestOutput
    from jaxserve.structured_outputs import StructuredOutputsParams
    from jaxserve.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


class LLM:
    """A model loaded into this process.

    Answers come from the engine's own thread and are collected on the caller's, without an event loop, so
    that scripts and notebooks work alike.  Calls from several threads run one after another.
    """

    def __init__(self, model: str, **engine_options: Any) -> None:
        """Load `model`; see engine_config for the options.  Raises ConfigError, CheckpointError."""
        config = engine_config(model, engine_options)
        self._open(assemble(config), config.seed)

    @classmethod
    def from_parts(cls, parts: EngineParts, *, seed: int | None = None) -> LLM:
        """An LLM around an unstarted engine client, wherever its engine runs."""
        llm = cls.__new__(cls)
        llm._open(parts, seed)
        return llm

    def _open(self, parts: EngineParts, seed: int | None) -> None:
        self._client = parts.client
        self._admission = Admission(
            parts.client.info, parts.tokenizer, parts.defaults, seed, parts.grammars, parts.media
        )
        self._lock = threading.Lock()
        self._request_ids = map(str, itertools.count())
        self._events: queue.SimpleQueue[Sequence[TokenOutput] | Exception] = queue.SimpleQueue()
        # The queue's own methods, not ours: the engine's thread must not keep an abandoned LLM alive.
        parts.client.start(self._events.put, self._events.put)
        self._finalizer = weakref.finalize(self, parts.client.shutdown)

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        return self._client.info

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._client.stats()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes, for fair measurements; False while another thread's prompts are being answered."""
        return self._client.reset_prefix_cache()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._admission.tokenizer

    def get_default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json), and `overrides` over them."""
        return self._admission.default_sampling_params(**overrides)

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: object = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; the outputs are in the order of the prompts.

        `prompts` is one prompt or a list: text, token ids, {"prompt": …} or {"prompt_token_ids": …}; a dict may have
        {"multi_modal_data": {"image": a PIL image or several}} beside them, and mm_processor_kwargs.  One
        SamplingParams serves all prompts, a list gives one each, None means the model's defaults.  `priority` has a
        number for each prompt: the lowest goes first.  There are no `lora_request`s.

        Raises RequestError before anything runs when a prompt or parameter is wrong, RequestFailedError when
        the engine gave up on a request, EngineDeadError when it died.
        """
        _refuse_lora(lora_request)
        all_prompts = prompt_list(prompts)
        all_params = self._params_for(len(all_prompts), sampling_params)
        priorities = [0] * len(all_prompts) if priority is None else list(priority)
        if len(priorities) != len(all_prompts):
            raise RequestError(
                f"priority must have a number for each of {len(all_prompts)} prompts, got {len(priorities)}.",
                param="priority",
            )
        all_prompts = tokenize_texts(all_prompts, self.get_tokenizer(), self.info.max_model_len)
        requests = []
        checked: set[int] = set()  # constraints, which prompts may share
        for i, (prompt, params) in enumerate(zip(all_prompts, all_params, strict=True)):
            try:
                if params.structured_outputs is not None and id(params.structured_outputs) not in checked:
                    self._check_structured(params.structured_outputs)
                    checked.add(id(params.structured_outputs))
                request_id = next(self._request_ids)
                requests.append(self._admission.admit(request_id, prompt, params, priority=priorities[i]))
            except RequestError as error:
                raise _said_of(error, "prompts", i, len(all_prompts)) from error
        with self._lock:
            return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: object = None,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto", "string", "openai"] = "auto",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation (a list of messages) or a list of conversations, through the chat template.

        Images are parts of a message's content: {"type": "image_url", "image_url": {"url": …}} as over HTTP, or
        {"type": "image_pil", "image_pil": a PIL image}.

        See ChatOptions and ChatTemplate.render for the template's arguments, `generate` for the rest.
        """
        _refuse_lora(lora_request)
        options: ChatOptions = {
            "chat_template": chat_template,
            "chat_template_content_format": chat_template_content_format,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "wants_tool_calls": bool(tools),
            "documents": documents,
            "chat_template_kwargs": chat_template_kwargs,
            "mm_processor_kwargs": mm_processor_kwargs,
            "must_fit": True,
        }
        conversations: Sequence[Any] = (
            [messages] if not messages or isinstance(messages[0], Mapping) else messages
        )
        prompts = []
        for i, conversation in enumerate(conversations):
            try:
                prompts.append(self._admission.render_chat(conversation, **options))
            except RequestError as error:
                raise _said_of(error, "conversations", i, len(conversations)) from error
        return self.generate(prompts, sampling_params, use_tqdm)

    def render_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> TokenizedPrompt:
        """The prompt that `chat` makes of one conversation, for `generate`; the options are chat's own."""
        return self._admission.render_chat(messages, **options)

    def shutdown(self) -> None:
        """Stop the engine.  Happens by itself when the LLM is no longer used or the interpreter ends."""
        self._finalizer()
        self._events.put(EngineDeadError("it was shut down"))  # for a call that waits on another thread

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _params_for(
        self, num_prompts: int, sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        """One for each prompt, and each asking for whole answers."""
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [_final_only(sampling_params)] * num_prompts
        if len(sampling_params) != num_prompts:
            raise RequestError(
                f"sampling_params must be one for all prompts or one for each: got {len(sampling_params)} "
                f"for {num_prompts} prompts.",
                param="sampling_params",
            )
        return [_final_only(params) for params in sampling_params]

    def _check_structured(self, constraint: StructuredOutputsParams) -> None:
        try:
            refusal = self._admission.check_structured(constraint).result(self._admission.grammars.time_limit)
        except TimeoutError:
            raise self._admission.grammars.too_slow(constraint) from None
        if refusal is not None:
            raise copied(refusal)

    def _run(self, requests: Sequence[RequestState], use_tqdm: bool) -> list[RequestOutput]:
        processor = OutputProcessor()
        for request in requests:
            processor.add(request)
        outputs: dict[str, RequestOutput] = {}
        with TokenBar(len(requests), enabled=use_tqdm) as bar:
            try:
                self._client.submit([core for request in requests for core in request.core_requests])
                while len(outputs) < len(requests):
                    for output in self._next_outputs(processor, bar):
                        outputs[output.request_id] = output
            finally:  # after an error or Ctrl-C something still runs; its late outputs find no request
                running = [
                    core_id
                    for request in processor.requests
                    for core_id in processor.drop(request.request_id)
                ]
                if running:
                    self._client.abort(running)
        return [outputs[request.request_id] for request in requests]

    def _next_outputs(self, processor: OutputProcessor, bar: TokenBar) -> list[RequestOutput]:
        """Wait for a step; the requests that it finished."""
        event = self._events.get()
        if isinstance(event, Exception):
            raise EngineDeadError(f"the engine died: {event}") from event
        changed, aborts = processor.process(event)
        if aborts:
            self._client.abort(aborts)
        finished = [output for request in changed if (output := request.take()) is not None]
        for request in changed:
            bar.see_prompt(request.request_id, request.num_prompt_tokens)
        bar.update(len(finished), sum(len(output.token_ids) for output in event))
        return finished


def _final_only(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, output_kind=OutputKind.FINAL_ONLY)


def _refuse_lora(lora_request: object) -> None:
    if lora_request is not None:
        raise RequestError(
            "lora_request is not supported: merge the adapter into the weights first.", param="lora_request"
        )


def _said_of(error: RequestError, what: str, index: int, count: int) -> RequestError:
    """The error, told of which of several it is."""
    where = f"{what}[{index}]: " if count > 1 else ""
    return type(error)(f"{where}{error}", param=error.param)
