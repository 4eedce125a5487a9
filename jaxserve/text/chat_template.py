"""Chat messages become the prompt text that a model was trained to continue."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2

from jaxserve.errors import RequestError
from jaxserve.text.chat_messages import plain_messages
from jaxserve.text.template_sandbox import TemplateEnvironment, render

ContentFormat = Literal["string", "openai"]

_FILE = "<template>"  # how jinja2 names the source of a template made from a string
_OWN_NAMES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception")
)
_CANARY = "jaxservecanary"
_END_MARK = "JAXSERVE-END-OF-FINAL-MESSAGE "  # the space shows whether the template trims


class ChatTemplate:
    """A compiled chat template.  Rendering is safe in several threads at once.

    Args:
        source: jinja2 source.
        special_tokens: what the template may name, {"bos_token": "<s>", …}.
        content_format: hand message contents over as strings ("string") or as lists of parts ("openai");
            None finds out what the template can take, and prefers what the request sent.

    Raises:
        RequestError: `source` is not valid jinja2 (param "chat_template").
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        content_format: ContentFormat | None = None,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = TemplateEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"chat_template is not valid jinja2: {error.message} (line {error.lineno})",
                param="chat_template",
            ) from error
        if content_format is None:
            self._takes_parts = self._takes_content([{"type": "text", "text": _CANARY}])
            self._takes_strings = not self._takes_parts or self._takes_content(_CANARY)
        else:
            self._takes_parts = content_format == "openai"
            self._takes_strings = not self._takes_parts
        self._takes_argument_objects = self._takes_arguments({_CANARY: 1}) or not self._takes_arguments(
            _CANARY
        )

    @property
    def content_format(self) -> ContentFormat:
        """What the template reads: lists of content parts ("openai") or plain text ("string")."""
        return "openai" if self._takes_parts else "string"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: OpenAI chat messages; contents are text, lists of text parts, or None.
            tools: OpenAI tool definitions, for the template to describe.
            documents: for templates that know retrieval.
            add_generation_prompt: end with what opens the assistant's turn.
            continue_final_message: end right after the last message's text, for the model to go on with it.
            template_kwargs: further variables (the request's `chat_template_kwargs`); they may replace
                special tokens, but nothing that has a field of its own.

        Raises:
            RequestError: the messages are unusable or the template refused them (param "messages"), or the
                template itself is at fault (param "chat_template"), with its own words and line.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true.",
                param="continue_final_message",
            )
        for name in template_kwargs or ():
            if name in _OWN_NAMES:
                raise RequestError(
                    f"chat_template_kwargs must not have {name!r}; use the request's own field for it.",
                    param="chat_template_kwargs",
                )
        conversation = plain_messages(
            messages,
            takes_strings=self._takes_strings,
            takes_parts=self._takes_parts,
            takes_argument_objects=self._takes_argument_objects,
        )
        final_text = _mark_final_text(conversation) if continue_final_message else ""
        variables = {
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": conversation,
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = self._render(variables)
        return _cut_after_final_text(prompt, final_text) if continue_final_message else prompt

    def _render(self, variables: dict[str, Any]) -> str:
        try:
            return render(self._template, variables)
        except RecursionError as error:
            raise RequestError("chat_template calls itself without end.", param="chat_template") from error
        except jinja2.TemplateError as error:
            # Mostly `raise_exception` of a template that does not like the conversation.
            raise RequestError(
                f"The chat template refused the messages: {error.message}{_line_of(error)}", param="messages"
            ) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RequestError(
                f"The chat template failed: {type(error).__name__}: {error}{_line_of(error)}",
                param="chat_template",
            ) from error

    def _takes_content(self, content: str | list[dict[str, str]]) -> bool:
        """Whether the template writes out a text that is given in this form, and not the form itself."""
        prompt = self._try([{"role": "user", "content": content}])
        if prompt is None or _CANARY not in prompt:
            return False
        return f"'{_CANARY}'" not in prompt and f'"{_CANARY}"' not in prompt  # the list itself, written out

    def _takes_arguments(self, arguments: str | dict[str, int]) -> bool:
        content = "Hello." if self._takes_strings else [{"type": "text", "text": "Hello."}]
        function = {"name": "f", "arguments": arguments}
        call = {"id": "call00001", "type": "function", "function": function}
        prompt = self._try(
            [
                {"role": "user", "content": content},
                {"role": "assistant", "content": "" if self._takes_strings else [], "tool_calls": [call]},
            ]
        )
        return prompt is not None and _CANARY in prompt

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(
                {
                    **self._special_tokens,
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": False,
                }
            )
        except RequestError:
            return None


def _line_of(error: Exception) -> str:
    """Where in the template an error came from: jinja2 rewrites tracebacks to the template's own lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _FILE]
    return f" (line {lines[-1]})" if lines else ""


def _mark_final_text(conversation: list[dict[str, Any]]) -> str:
    """Put a mark behind the last message's text, in place, to find its end in the prompt.  The text."""
    content = conversation[-1]["content"]
    if isinstance(content, str):
        conversation[-1]["content"] = content + _END_MARK
        return content
    if not content:
        content.append({"type": "text", "text": ""})
    text = content[-1]["text"]
    content[-1]["text"] = text + _END_MARK
    return text


def _cut_after_final_text(prompt: str, final_text: str) -> str:
    mark = _END_MARK.rstrip()
    end = prompt.rfind(mark)
    if end < 0 or final_text.strip() not in prompt:
        raise RequestError(
            "continue_final_message does not work here: the chat template does not write the last message's "
            "text out as it is.",
            param="continue_final_message",
        )
    # A template that trims messages would have trimmed this one's end too, had the mark not been in the way.
    return prompt[:end] if prompt.startswith(_END_MARK, end) else prompt[:end].rstrip()
