"""What a request gives back, shaped like vLLM's outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msgspec import Struct
else:
    try:
        from msgspec import Struct
    except ImportError:  # benchmarks run the engine where none of the server's packages are

        class Struct:
            """As much of msgspec's as is needed here."""

            def __init_subclass__(cls, **options: Any) -> None:
                dataclass(cls)


FINISH_STOP = "stop"  # end token, stop token or stop string
FINISH_LENGTH = "length"  # max_tokens or the model's context
FINISH_ABORT = "abort"  # the caller went away
FINISH_ERROR = "error"  # the engine gave up on this request


class Logprob(Struct, gc=False):  # a long prompt has hundreds of thousands, none of them in a cycle
    """One candidate token's log-probability under the raw model distribution."""

    logprob: float
    rank: int | None = None  # 1 is the most likely
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of the n answers to a prompt (all of it, or what is new: SamplingParams.output_kind)."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None  # one dict per token; the sampled token comes first
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it; None for EOS


@dataclass(slots=True)
class RequestOutput:
    """The state of one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # first entry is None: nothing precedes it
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    finished: bool = False
