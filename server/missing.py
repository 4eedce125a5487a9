"""What to say of a path that is not here, where vLLM, OpenAI or a slip of the base URL explains it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_TEXT_ONLY = "this server generates text"
_CONTROL = "this server is controlled by its flags and signals"

# Paths, or what they begin with, and what explains them.
_HINTS = (
    ("/v1/responses /v1/assistants /v1/threads", "use /v1/chat/completions"),
    ("/v1/messages", "Anthropic's API is not spoken; use /v1/chat/completions"),
    (
        "/v1/embeddings /v2/embed /pooling /classify /score /v1/score /rerank /v1/rerank /v2/rerank",
        f"{_TEXT_ONLY}, and makes no embeddings, scores or classes",
    ),
    ("/v1/audio /v1/realtime", f"{_TEXT_ONLY}, and neither hears nor speaks"),
    ("/v1/images /v1/videos", f"{_TEXT_ONLY}, and makes no pictures"),
    ("/v1/moderations", f"{_TEXT_ONLY}, and judges none"),
    ("/v1/files /v1/batches", "send the requests themselves; those of the same time share steps"),
    ("/v1/load_lora_adapter /v1/unload_lora_adapter", "LoRA adapters are not served"),
    ("/generate /inference /invocations", "use /v1/completions or /v1/chat/completions"),
    ("/tokenizer_info", "there is /tokenize"),
    ("/sleep /wake_up /is_sleeping /reset_prefix_cache /collective_rpc", _CONTROL),
    ("/start_profile /stop_profile /server_info /pause /resume /abort_requests", _CONTROL),
    ("/docs /redoc /openapi.json", "OpenAI's document of its API describes this one"),
)


def explained(path: str, routes: Iterable[str]) -> str:
    """How a sentence about `path` ends: with a reason, with the nearest of `routes`, or with a full stop."""
    for beginnings, hint in _HINTS:
        if any(path == beginning or path.startswith(beginning + "/") for beginning in beginnings.split()):
            return f": {hint}."
    plain = [route for route in routes if "<" not in route]
    near = difflib.get_close_matches(path[:200], plain, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else "."
