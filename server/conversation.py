"""From the messages of a request to the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.async_llm import LONG_TEXT
from jaxserve.errors import RequestError
from jaxserve.inputs import ChatOptions, TokenizedPrompt
from jaxserve.server.protocol import TemplateFields
from jaxserve.server.state import ServerState


async def render(
    state: ServerState,
    messages: Sequence[Any],
    fields: TemplateFields,
    num_bytes: int,
    *,
    add_special_tokens: bool = False,
) -> TokenizedPrompt:
    """The prompt of a conversation; a long one (`num_bytes` of the request) is rendered on another thread.

    Raises RequestError naming the field at fault.
    """
    kwargs = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
    options: ChatOptions = {
        "chat_template_kwargs": kwargs,
        "add_generation_prompt": fields.add_generation_prompt,
        "continue_final_message": bool(fields.continue_final_message),
        "tools": fields.tools,
        "documents": fields.documents,
        "add_special_tokens": add_special_tokens,
        **_template(state, fields),
    }
    if num_bytes > LONG_TEXT or fields.chat_template is not None:
        return await asyncio.to_thread(state.llm.render_chat, messages, **options)
    return state.llm.render_chat(messages, **options)


def echoed_text(messages: Sequence[Any]) -> str:
    """What `echo` puts in front of the answer: the last message, where it is the assistant's own."""
    last = messages[-1] if messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return ""
    content = last.get("content")
    if isinstance(content, list):
        texts = [
            part if isinstance(part, str) else part.get("text") or part.get("refusal") for part in content
        ]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _template(state: ServerState, fields: TemplateFields) -> ChatOptions:
    """Which template: the request's, where those are trusted, the operator's, or the model's own."""
    settings = state.settings
    if fields.chat_template is not None:
        if not settings.trust_request_chat_template:
            raise RequestError(
                "chat_template is not accepted from requests here; the operator may allow it with "
                "--trust-request-chat-template.",
                param="chat_template",
            )
        return {"chat_template": fields.chat_template}
    if settings.chat_template is None and state.llm.tokenizer.chat_template is None:
        raise RequestError(
            "messages cannot be served: the model has no chat template. Use /v1/completions, or let the "
            "operator give a template.",
            param="messages",
        )
    return {
        "chat_template": settings.chat_template,
        "chat_template_content_format": settings.chat_template_content_format,
    }
