"""The door: checks one request against the model and fans it out into core requests."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack, cast

from jaxserve.engine.protocol import CoreRequest
from jaxserve.errors import RequestError
from jaxserve.inputs import (
    AnyPrompt,
    ChatOptions,
    Prompt,
    TokenizedPrompt,
    check_characters,
    check_prompt,
    encode_texts,
    tokenize_prompt,
)
from jaxserve.media.policy import MediaPolicy
from jaxserve.request_state import RequestState
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.text.chat_template import ChatTemplate, ContentFormat

if TYPE_CHECKING:
    from concurrent.futures import Future

    from jaxserve.engine.protocol import EngineInfo
    from jaxserve.loading.checkpoint import GenerationDefaults
    from jaxserve.media.loader import ImageSource
    from jaxserve.media.patches import ProcessedImage
    from jaxserve.prompt_images import PromptImages
    from jaxserve.structured_outputs import StructuredOutputsParams
    from jaxserve.text.tokenizer import Tokenizer

MAX_N = 16384  # answers to one prompt, vLLM's limit: n alone must not exhaust the host's memory
SEED_SPACE = 2**64
_MEDIA = ("multi_modal_data", "mm_processor_kwargs")  # of a prompt, beside its text or tokens


class Admission:
    """What a request is checked against, and the source of seeds for requests that bring none."""

    def __init__(
        self,
        info: EngineInfo,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        seed: int | None = None,
        grammars: GrammarCompiler | None = None,
        media: MediaPolicy | None = None,
    ) -> None:
        """`seed` makes the drawn seeds, and so the answers, a function of the order of requests.

        `grammars` is the compiler that an engine in this process has, to share what is compiled; by default one is
        made.  `media` says which images a model that takes them may be sent.
        """
        self.info = info
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._seeds: random.Random = random.SystemRandom() if seed is None else random.Random(seed)
        self._serials = itertools.count()
        # As in vLLM, the tokenizer's end token is the end, and further ones of generation_config.json are stop
        # tokens: an answer that one of them ends has it as its stop_reason.
        eos = tokenizer.eos_token_id
        # A tokenizer may know more tokens than the model: it never writes those.
        self.eos_token_ids = () if eos is None or eos >= info.vocab_size else (eos,)
        self.more_end_token_ids = tuple(
            i for i in dict.fromkeys(defaults.eos_token_ids) if i < info.vocab_size and i != eos
        )
        self.grammars = grammars or GrammarCompiler(
            tokenizer, info.vocab_size, end_token_ids(tokenizer, defaults)
        )
        self.images = _prompt_images(info, tokenizer, media or MediaPolicy())
        # Compiling a template costs milliseconds; most callers have one.
        compile_template = functools.partial(_compile_template, tokenizer.special_tokens)
        self._compiled = functools.lru_cache(maxsize=8)(compile_template)

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json), and `overrides` over them."""
        return SamplingParams(**{**self.defaults.sampling, **overrides})

    def render_chat(self, messages: Sequence[Any], **options: Unpack[ChatOptions]) -> TokenizedPrompt:
        """The prompt of a conversation, by the model's chat template or the one given.  Safe on any thread.

        Images are loaded here unless they come with the options, which may take as long as fetching does.

        Raises RequestError naming the field: see ChatTemplate.render.
        """
        images = self.images
        loaded = options.get("images")
        if loaded is None:
            loaded = self.load_images(messages, options.get("mm_processor_kwargs"))
        marks = images.marks() if images is not None else None
        tools = options.get("tools")
        template = self.chat_template(
            options.get("chat_template"),
            options.get("chat_template_content_format", "auto"),
            has_tools=bool(tools),
        )
        if template is None:
            raise RequestError(
                "chat_template is missing: the model has none, so give one, or use generate with plain text.",
                param="chat_template",
            )
        continues = options.get("continue_final_message", False)
        opens_turn = options.get("add_generation_prompt")
        text = template.render(
            messages,
            tools=tools,
            documents=options.get("documents"),
            add_generation_prompt=not continues if opens_turn is None else opens_turn,
            continue_final_message=continues,
            template_kwargs=options.get("chat_template_kwargs"),
            wants_tool_calls=options.get("wants_tool_calls", False),
            write_call=options.get("write_call"),
            marks=marks,
        )
        # The template has written the special tokens, BOS among them, where they belong.
        add_special_tokens = options.get("add_special_tokens", False)
        check_characters([text], options.get("max_characters"), param="messages")
        limit = self.info.max_model_len if options.get("must_fit", False) else None
        (token_ids,) = encode_texts([text], self.tokenizer, limit, add_special_tokens, param="messages")
        prompt = TokenizedPrompt(token_ids, text)
        if images is None or marks is None:
            return prompt
        return images.place(prompt, [loaded[i] for i in marks.order], param="messages")

    def image_sources(self, messages: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[ImageSource]:
        """The images of a conversation; none for a text model, which refuses them when it renders.

        `kwargs` is mm_processor_kwargs.  Raises RequestError, for a text model that is given those, too.
        """
        if self.images is not None:
            return self.images.of_messages(messages)
        if kwargs is not None:
            raise _text_only("mm_processor_kwargs")
        return []

    def load_images(
        self, messages: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> list[ProcessedImage]:
        """The images of a conversation, ready for render_chat.  Holds the thread up while they are fetched.

        Raises RequestError naming the image at fault.
        """
        sources = self.image_sources(messages, kwargs)
        if self.images is None or (not sources and kwargs is None):
            return []
        return self.images.loader.load_now(sources, kwargs)

    def prepare(self, prompt: AnyPrompt) -> TokenizedPrompt:
        """Token ids and images of a prompt in any accepted shape.  Holds the thread up where it has images.

        Raises RequestError naming the field.
        """
        if not isinstance(prompt, Mapping):
            return tokenize_prompt(prompt, self.tokenizer, self.info.max_model_len)
        rest = {name: value for name, value in prompt.items() if name not in _MEDIA}
        tokenized = tokenize_prompt(cast(Prompt, rest), self.tokenizer, self.info.max_model_len)
        if self.images is None:
            for name in _MEDIA:
                if prompt.get(name):
                    raise _text_only(name)
            return tokenized
        sources, kwargs = self.images.of_prompt(prompt), prompt.get("mm_processor_kwargs")
        if not sources and kwargs is None:
            return tokenized
        loaded = self.images.loader.load_now(sources, kwargs)
        return self.images.place(tokenized, loaded, param="prompt")

    def chat_template(
        self, source: str | None, content_format: str, *, has_tools: bool = False
    ) -> ChatTemplate | None:
        """The compiled template, or the model's own, if it has one.

        See Tokenizer.template_source for what `source` may be.

        Raises RequestError for a broken template and an unknown name.
        """
        found = self.tokenizer.template_source(source, has_tools=has_tools)
        return None if found is None else self._compiled(found, content_format)

    def check_structured(self, constraint: StructuredOutputsParams) -> Future[RequestError | None]:
        """Compile a constraint, on another thread.  The future has what is wrong with it: see GrammarCompiler.check."""
        return self.grammars.check(constraint)

    def admit(
        self,
        request_id: str,
        prompt: AnyPrompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> RequestState:
        """The checked request with its n core requests.  Raises RequestError naming the wrong field.

        Core requests get ids that are never used again: outputs that are still on their way when a request ends
        must not reach the next one that its caller gives the same id.
        """
        tokenized = self.prepare(prompt)
        check_prompt(tokenized, self.info)
        if self.images is not None:
            self.images.check(tokenized)
        params.check_vocabulary(self.info.vocab_size, self.info.max_logprobs)
        if not -(2**63) <= priority < 2**63:
            raise RequestError(f"priority must be a 64-bit integer, got {priority}.", param="priority")
        if params.n > MAX_N:
            raise RequestError(f"n must be at most {MAX_N}, got {params.n}.", param="n")
        stop_token_ids = tuple(dict.fromkeys(params.stop_token_ids or ()))
        if not params.ignore_eos:
            stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *self.more_end_token_ids)))
        core = CoreRequest(
            request_id=request_id,
            prompt_token_ids=tokenized.token_ids,
            params=self._core_params(params, self.info.max_model_len - len(tokenized.token_ids)),
            eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
            stop_token_ids=stop_token_ids,
            bad_word_ids=tuple(
                ids
                for ids in bad_word_ids(params.bad_words or (), self.tokenizer)
                if max(ids) < self.info.vocab_size
            ),
            grammar=None
            if params.structured_outputs is None
            else self.grammars.text(params.structured_outputs),
            priority=priority,
            arrival_time=time.monotonic(),
            cache_salt=cache_salt,
            images=tokenized.images,
        )
        cores = [
            replace(core, request_id=f"{core.request_id}#{next(self._serials)}")
            for core in _fan_out(core, params.n)
        ]
        return RequestState(request_id, tokenized, params, cores, self.tokenizer)

    def _core_params(self, params: SamplingParams, room: int) -> SamplingParams:
        """What the engine needs to know: one answer, a seed, a max_tokens that fits; texts stay here."""
        allowed = params.allowed_token_ids
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        return replace(
            params,
            n=1,
            top_k=min(params.top_k, self.info.vocab_size),
            allowed_token_ids=allowed and tuple(dict.fromkeys(allowed)),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            stop=(),
            stop_token_ids=(),
            bad_words=(),
            structured_outputs=None,
        )


def _prompt_images(info: EngineInfo, tokenizer: Tokenizer, policy: MediaPolicy) -> PromptImages | None:
    if info.images is None:
        return None
    from jaxserve.prompt_images import (
        PromptImages,
    )  # brings PIL and an HTTP client, which text has no use for

    return PromptImages(info.images, info, tokenizer, policy)


def _text_only(name: str) -> RequestError:
    return RequestError(f"{name} is not supported: this model takes text only; leave it out.", param=name)


def end_token_ids(tokenizer: Tokenizer, defaults: GenerationDefaults) -> tuple[int, ...]:
    """All tokens that may end an answer, the tokenizer's own first."""
    eos = tokenizer.eos_token_id
    return tuple(dict.fromkeys((*(() if eos is None else (eos,)), *defaults.eos_token_ids)))


def bad_word_ids(bad_words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences of each word, as a text's beginning and within a text (after a space)."""
    found: dict[tuple[int, ...], None] = {}  # in order, each once
    for word in bad_words:
        for text in (word.lstrip(), " " + word.lstrip()):
            token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if token_ids:
                found[token_ids] = None
    return tuple(found)


def _compile_template(special_tokens: Mapping[str, str], source: str, content_format: str) -> ChatTemplate:
    if content_format not in ("auto", "string", "openai"):
        raise RequestError(
            f"chat_template_content_format must be auto, string or openai, got {content_format!r:.60}.",
            param="chat_template_content_format",
        )
    chosen = None if content_format == "auto" else cast(ContentFormat, content_format)
    return ChatTemplate(source, special_tokens, chosen)


def _fan_out(core: CoreRequest, n: int) -> list[CoreRequest]:
    """n requests with ids "{id}-{i}" and seeds seed+i; the prompt's log-probabilities come from the first."""
    if n == 1:
        return [core]
    assert core.params.seed is not None
    first = replace(core, request_id=f"{core.request_id}-0")
    rest_params = replace(core.params, prompt_logprobs=None)
    rest = []
    for i in range(1, n):
        seed = core.params.seed + i
        params = rest_params.with_seed(seed if seed < SEED_SPACE else seed - SEED_SPACE)
        rest.append(replace(core, request_id=f"{core.request_id}-{i}", params=params))
    return [first, *rest]
