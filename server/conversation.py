"""From the messages of a request to the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.async_llm import LONG_TEXT
from jaxserve.errors import RequestError
from jaxserve.inputs import ChatOptions, TokenizedPrompt
from jaxserve.server.call_writing import call_writer
from jaxserve.server.protocol import TemplateFields
from jaxserve.server.state import ServerState
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.image_parts import forget_images, unread_image_fields

MAX_REQUEST_TEMPLATE = 50_000  # characters; compiling takes a while, and models' own have some 20,000


async def render(
    state: ServerState,
    messages: Sequence[Any],
    fields: TemplateFields,
    num_bytes: int,
    *,
    add_special_tokens: bool = False,
    wants_tool_calls: bool = False,
    must_fit: bool = True,
) -> TokenizedPrompt:
    """The prompt of a conversation; a long one (`num_bytes` of the request) is rendered on another thread.

    Its images are loaded before, on threads of their own.

    `wants_tool_calls` is ChatTemplate.render's, `must_fit` that of ChatOptions.  Raises RequestError naming the field
    at fault.
    """
    template = _template(state, fields)  # refused before anything is fetched for it
    images = await state.llm.load_images(messages, fields.mm_processor_kwargs)
    options: ChatOptions = {
        "add_generation_prompt": fields.add_generation_prompt,
        "continue_final_message": bool(fields.continue_final_message),
        "tools": [tool.as_sent() for tool in fields.tools or ()] or None,
        "documents": fields.documents,
        "wants_tool_calls": wants_tool_calls,
        "write_call": call_writer(state.settings.tool_call_parser),
        "add_special_tokens": add_special_tokens,
        "must_fit": must_fit,
        "max_characters": None if must_fit else state.llm.max_text,
        "images": images,
        **template,
    }

    def rendered() -> TokenizedPrompt:
        kwargs = _kwargs(template_of(state, fields), state, fields)
        return state.llm.render_chat(messages, **{**options, "chat_template_kwargs": kwargs})

    if num_bytes > LONG_TEXT or fields.chat_template is not None:
        return await state.llm.on_thread(rendered, num_bytes, is_bounded=must_fit)
    return rendered()


def template_of(state: ServerState, fields: TemplateFields) -> ChatTemplate:
    """The chat template of a request.  Raises RequestError where there is none or it is not to be used."""
    chosen = _template(state, fields)
    template = state.llm.chat_template(
        chosen.get("chat_template"),
        chosen.get("chat_template_content_format", "auto"),
        has_tools=bool(fields.tools),
    )
    if template is None:
        raise RequestError(
            "messages cannot be served: the model has no chat template. Use /v1/completions, or let the "
            "operator give a template.",
            param="messages",
        )
    return template


def ignored_template_fields(state: ServerState, fields: TemplateFields) -> list[str]:
    """Names of what a request says to the template and the template does not read, for X-Ignored-Params.

    May compile the template of a request that brings one, like `render` after which it should be called.
    """
    known = template_of(state, fields).variables
    names = [
        f"chat_template_kwargs.{name}" for name in fields.chat_template_kwargs or () if name not in known
    ]
    if fields.reasoning_effort is not None and known.isdisjoint(("reasoning_effort", *_THINKING)):
        names.append("reasoning_effort")
    return names


def ignored_image_fields(state: ServerState, messages: Sequence[Any]) -> list[str]:
    """Names of what image parts say and nobody reads; none for a text model, which has refused the parts."""
    return list(unread_image_fields(messages)) if state.llm.info.images is not None else []


def forget_loaded_images(state: ServerState, *conversations: Sequence[Any]) -> int:
    """Let go of what the images of messages were loaded from, while their request is answered.

    The number of characters that the first one of these conversations has lost, of which the others are copies.
    """
    if state.llm.info.images is None:
        return 0
    first, *_ = [forget_images(messages) for messages in conversations]
    return first


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


# What templates call the switch for thinking aloud.
_THINKING = ("enable_thinking", "thinking")


def _kwargs(template: ChatTemplate, state: ServerState, fields: TemplateFields) -> dict[str, Any]:
    """The variables that a request sets: the operator's defaults, then its own.

    reasoning_effort reaches a template that does not read it as the switch for thinking, where there is one:
    "none" turns it off, everything else on.
    """
    kwargs = {**state.settings.default_chat_template_kwargs, **(fields.chat_template_kwargs or {})}
    if fields.reasoning_effort is None:
        return kwargs
    kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
    if "reasoning_effort" not in template.variables:
        for name in _THINKING:
            if name in template.variables and name not in (fields.chat_template_kwargs or ()):
                kwargs[name] = fields.reasoning_effort != "none"
    return kwargs


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
        if len(fields.chat_template) > MAX_REQUEST_TEMPLATE:
            raise RequestError(
                f"chat_template must have at most {MAX_REQUEST_TEMPLATE} characters, got "
                f"{len(fields.chat_template)}.",
                param="chat_template",
            )
        return {"chat_template": fields.chat_template}
    return {
        "chat_template": settings.chat_template,
        "chat_template_content_format": settings.chat_template_content_format,
    }
