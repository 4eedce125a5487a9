"""Where our answers differ from the recorded ones of vLLM on purpose, and why."""

from __future__ import annotations

from dataclasses import dataclass

from tests.server.recorded import Told


@dataclass(frozen=True)
class Difference:
    """What is different about one answer; what is left at its default is the same."""

    why: str = ""
    status: int | None = None
    param: str | None = None  # the field that an error names
    left_out: frozenset[str] = frozenset()  # keys that hold something there and are not here
    choices: tuple[Told, ...] | None = None  # what ours say


def _keys(names: str, why: str) -> Difference:
    return Difference(why, left_out=frozenset(names.split()))


def _param(name: str, why: str = "the peer names no field, or not the one that was sent") -> Difference:
    return Difference(why, param=name)


def _status(status: int, why: str, param: str | None = None) -> Difference:
    return Difference(why, status=status, param=param)


def _says(why: str, *calls: tuple[str, str], text: str = "", ends: str = "tool_calls") -> Difference:
    return Difference(why, choices=(Told(text, calls, ends),))


_UNASKED = "nobody asked for it"
_CACHE = _keys(
    "created_cache_tokens", "the cache is filled by whole pages as the prompt goes by: nothing to tell"
)
_ROUTE = _status(404, "the route is not served by this version")
_OWN_TEXT = "arguments are the model's own text, streamed or not"
_HALF = "half a character at the end is dropped, not told as U+FFFD"

_PARIS = '{"city": "Paris", "unit": "celsius"}'

DIFFERENCES: dict[str, Difference] = {
    # Keys.
    "apikey/flag-prompt-tokens-details-again": _CACHE,
    "apikey/flag-prompt-tokens-details-first": _CACHE,
    "apikey/flag-request-id-header-echo": _CACHE,
    "apikey/flag-return-tokens-as-token-ids": _CACHE,
    "apikey/key-right": _CACHE,
    "smollm2/chat-echo-user-last": _keys("prompt_logprobs", _UNASKED),
    "smollm2/comp-echo-logprobs": _keys("prompt_logprobs", _UNASKED),
    "smollm2/comp-echo-logprobs-max-tokens-0": _keys("prompt_logprobs", _UNASKED),
    "smollm2/comp-echo-stream": _keys("prompt_token_ids", _UNASKED),
    "smollm2/comp-echo-logprobs-stream": _keys("prompt_token_ids", _UNASKED),
    # The field that an error names.
    "apikey/flag-max-logprobs-3": _param("top_logprobs"),
    "apikey/key-missing-options": _param("Origin"),
    "noflag/noflag-tool-auto": _param("tool_choice"),
    "noflag/noflag-tool-default-choice": _param("tools"),
    "noflag/noflag-tool-named": _param("tool_choice"),
    "noflag/noflag-tool-required-stream": _param("tool_choice"),
    "smollm2/chat-continue-final-and-add-generation": _param("continue_final_message"),
    "smollm2/chat-repetition-penalty-0": _param("repetition_penalty"),
    "smollm2/chat-so-two-kinds": _param("structured_outputs"),
    "smollm2/chat-stop-empty-string": _param("stop"),
    "smollm2/chat-template-in-request": _param("chat_template"),
    "smollm2/chat-top-logprobs-21": _param("top_logprobs"),
    "smollm2/chat-top-logprobs-minus1": _param("top_logprobs"),
    "smollm2/comp-prompt-2048-tokens": _param("prompt"),
    "smollm2/comp-token-id-out-of-vocab": _param("prompt"),
    "smollm2/err-body-list": _param("body"),
    "smollm2/err-content-type-text": _param("Content-Type"),
    "smollm2/err-image-url-on-text-model": _param("messages"),
    "smollm2/err-json-schema-bad-type": _param("response_format"),
    "smollm2/err-json-schema-unsupported-feature": _param("response_format"),
    "smollm2/err-messages-empty": _param("messages"),
    "smollm2/err-min-p-2": _param("min_p"),
    "smollm2/err-n-0": _param("n"),
    "smollm2/err-n-negative": _param("n"),
    "smollm2/err-prompt-too-long": _param("messages"),
    "smollm2/err-prompt-too-long-stream": _param("messages"),
    "smollm2/err-regex-bad": _param("structured_outputs"),
    "smollm2/err-top-logprobs-50": _param("top_logprobs"),
    # Statuses.
    "noflag/noflag-messages-tool": _ROUTE,
    "qwen/q-messages-tool": _ROUTE,
    "qwen/q-messages-tool-stream": _ROUTE,
    "smollm2/chat-batch": _ROUTE,
    "smollm2/get-openapi-paths": _ROUTE,
    "smollm2/inference-generate": _ROUTE,
    "smollm2/invocations": _ROUTE,
    "qwen/err-tool-parameters-bad-schema-required": _status(
        400, "a schema that is none cannot hold the arguments: the peer lets them be anything", "tools"
    ),
    "smollm2/chat-beam-search": _status(400, "beams are not searched: refused by name", "use_beam_search"),
    "smollm2/chat-logprob-token-ids": _status(400, "not served: refused by name", "logprob_token_ids"),
    "smollm2/chat-stop-5": _status(200, "stop takes any number of strings"),
    "smollm2/head-health": _status(200, "load balancers ask with HEAD, too"),
    # Texts.
    "smollm2/chat-utf8-cut": Difference(_HALF),
    "smollm2/chat-utf8-cut-emoji-logprobs": Difference(_HALF),
    "forced/forced-compact-json": _says(_OWN_TEXT, ("get_weather", '{"city":"Paris","n":1.50}')),
    "forced/forced-unicode": _says(
        _OWN_TEXT, ("get_weather", '{"city": "東京 🎉", "note": "a\\u00e9\\n\\"q\\""}')
    ),
    "forced/forced-arguments-first-stream": _says(
        "the peer's stream runs on into the rest of the call", ("get_weather", '{"city": "Paris"}')
    ),
    "forced/forced-call-then-text": _says(
        "text after a call is kept", ("get_weather", _PARIS), text="\nDone."
    ),
    "forced/forced-no-arguments-key": _says(
        "a call of a function without arguments, streamed (as there) or not", ("get_weather", "{}")
    ),
    "forced/forced-mention-stream": _says(
        "a tag that begins no call is text", text="Use <tool_call> to call.", ends="stop"
    ),
    "qwen/tool-named": _says("a named call is the reason why the answer ended", ("get_weather", _PARIS)),
    "qwen/tool-named-stream": _says(
        "a named call is the reason why the answer ended", ("get_weather", _PARIS)
    ),
    "qwen/tool-required-cut-stream": _says(
        "what the cut left of a call is text, streamed or not",
        text='<tool_call>\n{"name": "get_weather',
        ends="length",
    ),
}


def difference(name: str) -> Difference:
    """The difference of one recording ("set/name"); an empty one where there is none."""
    return DIFFERENCES.get(name, Difference())
