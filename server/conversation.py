"""From the messages of a request to the prompt's text."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.server.protocol import TemplateFields
from jaxserve.server.state import ServerState
from jaxserve.text.chat_template import ChatTemplate

LONG_CONVERSATION = 64 * 1024  # bytes of a request beyond which rendering would hold up the event loop


async def render(state: ServerState, messages: Sequence[Any], fields: TemplateFields, num_bytes: int) -> str:
    """The prompt of a conversation; a long one (`num_bytes` of the request) is rendered on another thread.

    Raises RequestError naming the field at fault.
    """
    kwargs = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
    continues = bool(fields.continue_final_message)
    adds_prompt = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt

    def work() -> str:
        return _template(state, fields).render(
            messages,
            tools=fields.tools,
            documents=fields.documents,
            add_generation_prompt=adds_prompt,
            continue_final_message=continues,
            template_kwargs=kwargs,
        )

    if num_bytes > LONG_CONVERSATION or fields.chat_template is not None:
        return await asyncio.to_thread(work)
    return work()


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


def _template(state: ServerState, fields: TemplateFields) -> ChatTemplate:
    if fields.chat_template is not None:
        if not state.settings.trust_request_chat_template:
            raise RequestError(
                "chat_template is not accepted from requests here; the operator may allow it with "
                "--trust-request-chat-template.",
                param="chat_template",
            )
        return ChatTemplate(fields.chat_template, state.llm.tokenizer.special_tokens)
    if state.chat_template is None:
        raise RequestError(
            "messages cannot be served: the model has no chat template. Use /v1/completions, or let the "
            "operator give a template.",
            param="messages",
        )
    return state.chat_template
