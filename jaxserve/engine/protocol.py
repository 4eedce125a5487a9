"""What crosses between a front end (text, HTTP) and an engine core (tokens): plain data, and EngineClient.

Everything here is data that msgpack can carry, so that the core may live in another process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxserve.config import ImageProcessorConfig
from jaxserve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInput:
    """One image of a prompt, ready for the vision tower."""

    # uint8 [h * w, 3, patch_size, patch_size]: RGB, resized, not normalised, one frame.  The patches are in the order
    # of transformers' pixel_values: those that become one token stand together.
    pixels: bytes
    grid_thw: tuple[
        int, int, int
    ]  # patches in time (1), down and across; h and w are multiples of merge_size
    content_hash: str  # of pixels and grid: what the tower makes of the image depends on nothing else
    offset: int  # of its first placeholder in prompt_token_ids
    num_tokens: int  # placeholders, t * h * w / merge_size**2 of them: each is the image token


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreRequest:
    """One sequence to generate.  A request with n > 1 becomes n of these, each with a seed of its own."""

    request_id: str  # never used twice by one front end, unlike the ids of its callers
    prompt_token_ids: list[int]
    # n is 1; seed and max_tokens are set; stop strings, stop_token_ids, bad_words and structured_outputs are empty:
    # what is left of them stands below.
    params: SamplingParams
    eos_token_ids: tuple[int, ...]  # end the answer without a stop reason; empty under ignore_eos
    stop_token_ids: tuple[int, ...] = ()  # end the answer and are told as its stop reason
    # Token sequences whose last token must not follow the others.
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None  # that the answer follows, as structured.grammar_text writes it
    priority: int = 0  # lower runs first, as in vLLM
    arrival_time: float = 0.0  # time.monotonic() at the door
    cache_salt: str | None = None  # prefix pages are shared only among requests of one salt
    # In the order of their offsets.  The prompt has no image token beside their placeholders.
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the raw logits."""

    token_id: int  # the sampled (or prompt) token
    logprob: float
    rank: int  # 1 is the most likely
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True, kw_only=True)
class TokenOutput:
    """What one engine step gave one sequence.  Nobody changes one; freezing it would treble the time to make it."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per token when asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # once, for prompt positions 1.., with the first token
    finish_reason: str | None = None
    stop_token_id: int | None = None  # set when one of stop_token_ids ended it
    is_complete: bool = False  # the grammar ended it, and the last token is part of the answer
    num_cached_tokens: int = 0
    # Seconds of time.monotonic(), which processes of one host share: when the sequence's first tokens were put into
    # a step, and when these ones came back from the device.
    scheduled_time: float = 0.0
    time: float = 0.0
    error: str | None = None  # the request failed; nothing more comes
    error_param: str | None = None  # the parameter that made it fail, if it was the request's own fault


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot for /metrics and /load.  Counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0  # including cached pages that nobody uses
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    mm_cache_queries: int = 0  # images that prompts have begun with
    mm_cache_hits: int = 0  # of them those that need not be encoded again
    num_preemptions: int = 0
    num_steps: int = 0
    compiles_after_ready: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """How a model with a vision tower takes images."""

    # What a chat template writes for one image, e.g. <|vision_start|><|image_pad|><|vision_end|>; holds
    # image_token_id once.
    marker_token_ids: tuple[int, ...]
    image_token_id: int
    max_image_tokens: int  # of one image, the most that the tower takes
    processor: ImageProcessorConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the engine settled on at start, for validation and for /v1/models."""

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    max_logprobs: int
    dtype: str
    device: str
    images: ImageInfo | None = None  # None: the model takes text only


OnOutputs = Callable[[Sequence[TokenOutput]], None]
OnDead = Callable[[Exception], None]


class EngineClient(Protocol):
    """How a front end reaches an engine core, wherever it runs.

    `start` registers the callbacks: `on_outputs(batch)` receives every step's outputs, `on_dead(error)` is called once
    when the core cannot go on.  Both are called from the client's own thread and must not block.
    `submit` and `abort` return at once and may be called from any thread; after the core died `submit` raises
    EngineDeadError.  An aborted request gives no further output, and its pages are free within one step.
    """

    info: EngineInfo

    def start(self, on_outputs: OnOutputs, on_dead: OnDead) -> None: ...

    def submit(self, requests: Sequence[CoreRequest]) -> None: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def stats(self) -> EngineStats: ...

    def reset_prefix_cache(self) -> bool: ...

    def shutdown(self) -> None: ...
