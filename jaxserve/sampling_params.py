"""How one request wants its tokens chosen."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.structured_outputs import StructuredOutputsParams

MAX_LOGIT_BIAS = 1024  # entries of logit_bias that one request may carry (a row of device state is this wide)
# What one request may ask of every step, so that no request slows the others down.
MAX_STOP_STRINGS = 1024
MAX_BAD_WORDS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_LIST_CHARACTERS = 16384  # of all stop strings, and of all bad words

_SWITCHES = (
    "include_stop_str_in_output",
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


class OutputKind(Enum):
    """What each RequestOutput of a running request holds."""

    CUMULATIVE = "cumulative"  # everything so far
    DELTA = "delta"  # what is new
    FINAL_ONLY = "final_only"  # one output, at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; the names and meanings are vLLM's.

    Processors apply in this order: logprobs are read from the raw logits; then allowed_token_ids, bad_words,
    min_tokens and structured_outputs mask; logit_bias adds; penalties; temperature; min_p; top_k; top_p (over what
    top_k kept).

    Lists may be given as any sequence, one string in place of a list of one, and None for an empty list; once
    built they are tuples.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16  # None: up to the model's context
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None  # None: all
    bad_words: str | Sequence[str] | None = ()
    logprobs: int | None = None  # top-k log-probabilities per sampled token, beside the sampled one's own
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    kept_special_tokens: (
        Sequence[int] | None
    ) = ()  # token ids that become text even if special ones are skipped
    structured_outputs: StructuredOutputsParams | None = None  # what the answer must look like
    output_kind: OutputKind = OutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        stop = self._put_tuple("stop", of_strings=True) or ()
        bad_words = self._put_tuple("bad_words", of_strings=True) or ()
        stop_token_ids = self._put_tuple("stop_token_ids") or ()
        kept_special_tokens = self._put_tuple("kept_special_tokens") or ()
        allowed_token_ids = self._put_tuple("allowed_token_ids", may_be_none=True)

        def need(ok: bool, name: str, wants: str) -> None:
            if not ok:
                shown = repr(getattr(self, name))
                shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
                raise RequestError(f"{name} must be {wants}, got {shown}.", param=name)

        def is_number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        def is_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        for name in ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            may_be_none = name not in ("n", "top_k", "min_tokens")
            need(is_int(value) or (value is None and may_be_none), name, "an integer")
        for name in _SWITCHES:
            need(isinstance(getattr(self, name), bool), name, "true or false")
        need(
            isinstance(self.output_kind, OutputKind),
            "output_kind",
            "an OutputKind of jaxserve.sampling_params",
        )
        need(
            isinstance(self.structured_outputs, StructuredOutputsParams | None),
            "structured_outputs",
            "StructuredOutputsParams or None",
        )
        need(self.n >= 1, "n", "at least 1")
        need(is_number(self.temperature) and 0 <= self.temperature <= 2, "temperature", "in [0, 2]")
        need(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(self.top_k >= -1, "top_k", "-1 or 0 (off), or at least 1")
        need(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            need(is_number(getattr(self, name)) and -2 <= getattr(self, name) <= 2, name, "in [-2, 2]")
        need(
            is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 1e4,
            "repetition_penalty",
            "above 0 and at most 10000 (1 is off)",
        )
        need(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        need(self.min_tokens >= 0, "min_tokens", "at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}.",
                param="min_tokens",
            )
        need(all(isinstance(s, str) and s for s in stop), "stop", "non-empty strings")
        need(all(isinstance(s, str) and s for s in bad_words), "bad_words", "non-empty strings")
        for name, strings, most in (
            ("stop", stop, MAX_STOP_STRINGS),
            ("bad_words", bad_words, MAX_BAD_WORDS),
        ):
            if len(strings) > most or sum(map(len, strings)) > MAX_LIST_CHARACTERS:
                raise RequestError(
                    f"{name} must have at most {most} strings of {MAX_LIST_CHARACTERS} characters together, "
                    f"got {len(strings)} of {sum(map(len, strings))}.",
                    param=name,
                )
        if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids must have at most {MAX_STOP_TOKEN_IDS} entries, got {len(stop_token_ids)}.",
                param="stop_token_ids",
            )
        need(allowed_token_ids != (), "allowed_token_ids", "at least one token id")
        for name, ids in (
            ("stop_token_ids", stop_token_ids),
            ("kept_special_tokens", kept_special_tokens),
            ("allowed_token_ids", allowed_token_ids or ()),
            ("logit_bias", self.logit_bias or ()),
        ):
            need(all(is_int(token_id) for token_id in ids), name, "made of integer token ids")
        need(self.logprobs is None or self.logprobs >= 0, "logprobs", "at least 0")
        need(self.prompt_logprobs is None or self.prompt_logprobs >= 0, "prompt_logprobs", "at least 0")
        if self.logit_bias:
            check_num_biases(len(self.logit_bias))
            for token_id, bias in self.logit_bias.items():
                if not is_number(bias):
                    raise RequestError(
                        f"logit_bias must map token ids to numbers, got {bias!r} for {token_id!r}.",
                        param="logit_bias",
                    )
        if stop and not self.detokenize:
            raise RequestError("stop needs detokenize=True.", param="stop")

    def _put_tuple(
        self, name: str, *, of_strings: bool = False, may_be_none: bool = False
    ) -> tuple[Any, ...] | None:
        """Make a tuple of the list that the caller gave, in place; RequestError for what is no list."""
        value = getattr(self, name)
        if value is None and may_be_none:
            return None
        if isinstance(value, str) and of_strings:
            value = (value,)
        elif value is None:
            value = ()
        elif isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            kind = "a string or a list of strings" if of_strings else "a list of token ids"
            raise RequestError(f"{name} must be {kind}, got {value!r:.60}.", param=name)
        items = tuple(value)
        object.__setattr__(self, name, items)
        return items

    def with_seed(self, seed: int) -> SamplingParams:
        """The same but for the seed, an integer of 64 bits; nothing is checked again: of one request there may be
        thousands, with lists as long as the vocabulary.
        """
        copied = copy.copy(self)
        object.__setattr__(copied, "seed", seed)
        return copied

    def check_vocabulary(self, vocab_size: int, max_logprobs: int) -> None:
        """Refuse token ids outside the model's vocabulary and more logprobs than the server gives."""
        for name, ids in (
            ("logit_bias", tuple(self.logit_bias or ())),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("stop_token_ids", self.stop_token_ids or ()),
        ):
            outside = [i for i in ids if not 0 <= i < vocab_size]
            if outside:
                raise RequestError(
                    f"{name} has token ids outside the vocabulary of {vocab_size}: {outside[:5]}.", param=name
                )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value > max_logprobs:
                raise RequestError(f"{name} must be at most {max_logprobs}, got {value}.", param=name)

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on which tokens there were before."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken: vLLM treats temperatures below 1e-5 as zero."""
        return self.temperature < 1e-5


def check_num_biases(count: int) -> None:
    """Raise RequestError for a logit_bias of so many entries, if they are too many."""
    if count > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {count}.", param="logit_bias"
        )
