"""What OpenAI's OpenAPI document (2.3.0) says of answers, as far as it concerns us, and the keys that are ours.

Stricter than the document: no key that is not named here.  A key is never null unless `or_null` says so.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
TOKEN_IDS = {"type": "array", "items": COUNT}


def words(*allowed: str) -> dict[str, Any]:
    return {"enum": list(allowed)}


def items(schema: Any, at_least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": at_least}


def or_null(schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def shape(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


# Keys that OpenAI does not have; vLLM does.
STOP_REASON = {"stop_reason": {"type": ["integer", "string"]}}
OUR_CHOICE_KEYS = {**STOP_REASON, "token_ids": TOKEN_IDS}
PROMPT_LOGPROBS = items(or_null({"type": "object"}))

USAGE = shape(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    {"prompt_tokens_details": shape({"cached_tokens": COUNT})},
)

CANDIDATE = {"token": TEXT, "logprob": {"type": "number"}, "bytes": or_null(TOKEN_IDS)}
LOGPROBS = or_null(
    shape(
        {
            "content": or_null(items(shape({**CANDIDATE, "top_logprobs": items(shape(CANDIDATE))}))),
            "refusal": {"type": "null"},
        }
    )
)

CHAT_FINISH = words("stop", "length", "tool_calls", "content_filter")

TOOL_CALL = shape(
    {"id": TEXT, "type": words("function"), "function": shape({"name": TEXT, "arguments": TEXT})}
)

MESSAGE = shape(
    {"role": words("assistant"), "content": or_null(TEXT), "refusal": or_null(TEXT)},
    {"tool_calls": items(TOOL_CALL, at_least=1), "reasoning": TEXT},
)

CHAT_COMPLETION = shape(
    {
        "id": TEXT,
        "object": words("chat.completion"),
        "created": COUNT,
        "model": TEXT,
        "choices": items(
            shape(
                {"index": COUNT, "message": MESSAGE, "logprobs": LOGPROBS, "finish_reason": CHAT_FINISH},
                OUR_CHOICE_KEYS,
            ),
            at_least=1,
        ),
    },
    {
        "system_fingerprint": TEXT,
        "usage": USAGE,
        "prompt_logprobs": PROMPT_LOGPROBS,
        "prompt_token_ids": TOKEN_IDS,
        "prompt_text": TEXT,
    },
)

TOOL_CALL_DELTA = shape(
    {"index": COUNT, "function": shape({}, {"name": TEXT, "arguments": TEXT})},
    {"id": TEXT, "type": words("function")},
)

DELTA = shape(
    {},
    {
        "role": words("assistant"),
        "content": TEXT,
        "reasoning": TEXT,
        "tool_calls": items(TOOL_CALL_DELTA, at_least=1),
    },
)

CHAT_CHUNK = shape(
    {
        "id": TEXT,
        "object": words("chat.completion.chunk"),
        "created": COUNT,
        "model": TEXT,
        "choices": items(
            shape(
                {"index": COUNT, "delta": DELTA, "finish_reason": or_null(CHAT_FINISH)},
                {"logprobs": LOGPROBS, **OUR_CHOICE_KEYS},
            )
        ),
    },
    {"usage": USAGE, "system_fingerprint": TEXT, "prompt_token_ids": TOKEN_IDS, "prompt_text": TEXT},
)

NUMBERS_OR_NULL = items({"type": ["number", "null"]})  # null: nothing precedes an echoed prompt's first token
COMPLETION_LOGPROBS = or_null(
    shape(
        {
            "text_offset": items(COUNT),
            "token_logprobs": NUMBERS_OR_NULL,
            "tokens": items(TEXT),
            "top_logprobs": items(or_null({"type": "object", "additionalProperties": {"type": "number"}})),
        }
    )
)


def _completion(finish_reason: Any) -> dict[str, Any]:
    choice = shape(
        {"index": COUNT, "text": TEXT, "logprobs": COMPLETION_LOGPROBS, "finish_reason": finish_reason},
        {**OUR_CHOICE_KEYS, "prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": TOKEN_IDS},
    )
    return shape(
        {
            "id": TEXT,
            "object": words("text_completion"),
            "created": COUNT,
            "model": TEXT,
            "choices": items(choice),
        },
        {"system_fingerprint": TEXT, "usage": USAGE},
    )


COMPLETION_FINISH = words("stop", "length", "content_filter")
COMPLETION = _completion(COMPLETION_FINISH)
COMPLETION_CHUNK = _completion(
    or_null(COMPLETION_FINISH)
)  # OpenAI streams null, too, whatever its document says

MODEL_KEYS = {"id": TEXT, "object": words("model"), "created": COUNT, "owned_by": TEXT}
OUR_MODEL_KEYS = {"root": TEXT, "max_model_len": COUNT, "permission": items({"type": "object"})}
MODELS = shape({"object": words("list"), "data": items(shape(MODEL_KEYS, OUR_MODEL_KEYS))})

ERROR = shape(
    {"error": shape({"message": TEXT, "type": TEXT, "param": or_null(TEXT), "code": or_null(TEXT)})}
)

_WHOLE = {"/v1/chat/completions": CHAT_COMPLETION, "/v1/completions": COMPLETION, "/v1/models": MODELS}
_CHUNKS = {"/v1/chat/completions": CHAT_CHUNK, "/v1/completions": COMPLETION_CHUNK}


def check(answer: Any, schema: dict[str, Any]) -> None:
    """Fail for an answer of another shape, saying where."""
    wrong = jsonschema.Draft202012Validator(schema).iter_errors(answer)
    error = best_match(wrong)
    assert error is None, f"{error.json_path}: {error.message[:300]}"


def check_whole(path: str, data: bytes) -> None:
    """Check an answer of one of OpenAI's routes; others have no shape here."""
    if path in _WHOLE:
        check(json.loads(data), _WHOLE[path])


def check_chunk(path: str, chunk: Any) -> None:
    """The same for an event of a stream."""
    check(chunk, _CHUNKS[path])
