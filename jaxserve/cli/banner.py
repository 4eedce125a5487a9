"""What `jaxserve serve` prints once it answers: where, and what to try first."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jaxserve import __version__

if TYPE_CHECKING:
    from jaxserve.engine.protocol import EngineInfo
    from jaxserve.server.settings import ServerSettings

QUESTION = "What is the capital of France? Answer in one sentence."


def banner(url: str, settings: ServerSettings, info: EngineInfo) -> str:
    """The text for a server that listens at `url`."""
    model = settings.served_model_names[0] if settings.served_model_names else info.model
    others = f" (also {', '.join(names)})" if (names := settings.served_model_names[1:]) else ""
    room = info.num_pages * info.page_size
    head = (
        f"\njaxserve {__version__} serves {model}{others} at {url}\n"
        f"  {info.dtype} on {info.device}, context {info.max_model_len} tokens, "
        f"{info.max_num_seqs} sequences at once, KV room for {room} tokens\n"
    )
    if info.images is not None:
        head += f"  takes images, which become up to {info.images.max_image_tokens} tokens each\n"
    if settings.uds is not None:
        return head + f"\nTry:\n  {_curl('http://localhost', model, settings)}\n"
    reachable = _reachable(url)
    key = " --api-key YOUR_API_KEY" if settings.api_keys else ""
    return (
        f"{head}\nTry:\n  {_curl(reachable, model, settings)}\n"
        f"\nor in Python (pip install openai):\n{_python(reachable, model, settings)}"
        f"\nor in a terminal:\n  jaxserve chat --url {reachable}{key}\n"
    )


def _curl(url: str, model: str, settings: ServerSettings) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0})
    words = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if settings.uds is not None:
        words[1:1] = ["--unix-socket", settings.uds]
    if settings.api_keys:
        words += ["-H", "Authorization: Bearer YOUR_API_KEY"]
    return f"{shlex.join(words)} \\\n    -d {shlex.quote(body)}"


def _python(url: str, model: str, settings: ServerSettings) -> str:
    key = "YOUR_API_KEY" if settings.api_keys else "none"
    return (
        f"  from openai import OpenAI\n"
        f"  client = OpenAI(base_url={f'{url}/v1'!r}, api_key={key!r})\n"
        f"  messages = [{{'role': 'user', 'content': {QUESTION!r}}}]\n"
        f"  answer = client.chat.completions.create(model={model!r}, messages=messages, temperature=0)\n"
        f"  print(answer.choices[0].message.content)\n"
    )


def _reachable(url: str) -> str:
    """The URL with an address that a client can connect to, where the server listens on all of them."""
    parts = urlsplit(url)
    if parts.hostname in ("0.0.0.0", "::"):
        return url.replace(f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname, "127.0.0.1", 1)
    return url
