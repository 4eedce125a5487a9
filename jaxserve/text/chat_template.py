"""Chat messages become the prompt text that a model was trained to continue."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2
import jinja2.meta
from jinja2.exceptions import SecurityError

from jaxserve.errors import RequestError
from jaxserve.text.chat_messages import Turn, checked_turns, shaped_calls, shaped_content
from jaxserve.text.image_parts import ImageMarks
from jaxserve.text.message_folding import fold
from jaxserve.text.template_limits import TemplateLimitError
from jaxserve.text.template_sandbox import TemplateEnvironment, WorkBudget, render
from jaxserve.text.template_traits import Render, find_traits
from jaxserve.text.tool_text import CallWriter, documents_text, hermes_call, tools_text

ContentFormat = Literal["string", "openai"]

_FILE = "<template>"  # how jinja2 names the source of a template made from a string
OWN_NAMES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception")
)
"""Variables that are never taken from `template_kwargs`: a request has fields of its own for them."""

_ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))
_END_MARK = "JAXSERVE-END-OF-FINAL-MESSAGE "  # the space shows whether the template trims
_MAX_ROLE = 64  # characters of a role that is none of OpenAI's
_ROLE_CANARY = "jaxservecanary"

# What compiling a template may raise beside TemplateSyntaxError: it is nested too deeply for jinja2 or Python.
_TOO_DEEP = (RecursionError, SyntaxError, MemoryError, OverflowError, ValueError)


class ChatTemplate:
    """A compiled chat template.  Rendering is safe in several threads at once.

    When it is built, short conversations with canaries find out what it writes (`traits`); when it renders, what
    it would leave out is moved to where it is written (message_folding.py).

    Args:
        source: jinja2 source.
        special_tokens: what the template may name, {"bos_token": "<s>", …}.
        content_format: hand message contents over as strings ("string") or as lists of parts ("openai");
            None finds out what the template can take, and prefers what the request sent.

    Raises:
        RequestError: `source` is not valid jinja2, or does not end within limits (param "chat_template").
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
        except _TOO_DEEP as error:
            raise RequestError(
                f"chat_template cannot be compiled, probably for being nested too deeply: {error}",
                param="chat_template",
            ) from error
        self.traits = find_traits(self._trial(), source, content_format)
        self._writes_role = functools.lru_cache(maxsize=16)(self._does_write_role)

    @property
    def content_format(self) -> ContentFormat:
        """What the template reads: lists of content parts ("openai") or plain text ("string")."""
        return "openai" if self.traits.user.takes_parts else "string"

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The names of what the template reads from outside, special tokens included."""
        return frozenset(jinja2.meta.find_undeclared_variables(TemplateEnvironment().parse(self.source)))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        wants_tool_calls: bool = False,
        write_call: CallWriter | None = None,
        marks: ImageMarks | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: OpenAI chat messages; contents are text, lists of parts, or None.
            tools: OpenAI tool definitions, for the template to describe.
            documents: for templates that know retrieval; others get them in the system message.
            add_generation_prompt: end with what opens the assistant's turn.
            continue_final_message: end right after the last message's text, for the model to go on with it.
            template_kwargs: further variables (the request's `chat_template_kwargs`); they may replace
                special tokens, but nothing that has a field of its own.
            wants_tool_calls: where the template does not show `tools`, describe them in the system message.
            write_call: how the model writes a call, where the template does not know; None: as Hermes does.
            marks: for a model that takes images; they learn in which order the prompt has them.

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
            if name in OWN_NAMES:
                raise RequestError(
                    f"chat_template_kwargs must not have {name!r}; use the request's own field for it.",
                    param="chat_template_kwargs",
                )
        write_call = write_call or hermes_call
        tools = self._plain_tools(tools) if tools else None
        described = []
        if tools and wants_tool_calls and not self.traits.shows_tools:
            described.append(tools_text(tools, write_call))
        if documents and not self.traits.shows_documents:
            described.append(documents_text(documents))
        turns = fold(checked_turns(messages, marks), self.traits, write_call, described)
        conversation = [self._shaped(turn) for turn in turns]
        final_text = _mark_final_text(conversation) if continue_final_message else ""
        if marks is not None:
            marks.take_from(conversation)
        variables = {
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": conversation,
            "tools": tools,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = self._render(variables, turns)
        if continue_final_message:
            prompt = _cut_after_final_text(prompt, final_text)
        return prompt if marks is None else marks.write(prompt)

    def _shaped(self, turn: Turn) -> dict[str, Any]:
        """A turn's message with its content and calls as the template takes them."""
        message, role = turn.message, turn.role
        if role not in _ROLES and (len(role) > _MAX_ROLE or not self._writes_role(role)):
            raise RequestError(
                f"messages[{turn.index}] has the role {role!r:.60}, for which this model's chat template writes "
                f"nothing; use one of {', '.join(sorted(_ROLES))}.",
                param="messages",
            )
        form = self.traits.form_of(role)
        message["content"] = shaped_content(
            message["content"], takes_strings=form.takes_strings, takes_parts=form.takes_parts
        )
        if "tool_calls" in message:
            message["tool_calls"] = shaped_calls(message["tool_calls"], self.traits.takes_argument_objects)
            if not message["content"] and not self.traits.takes_empty_text:
                message["content"] = None
        return message

    def _plain_tools(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Tools with the names and nulls that vLLM gives them, so that prompts are the same token by token."""
        return [_plain_tool(tool, takes_nulls=self.traits.takes_bare_tools) for tool in tools]

    def _render(
        self, variables: dict[str, Any], turns: Sequence[Turn] = (), budget: WorkBudget | None = None
    ) -> str:
        try:
            return render(self._template, variables, budget)
        except RecursionError as error:
            raise RequestError(
                "The chat template calls itself without end, or gets values nested too deeply.",
                param="chat_template",
            ) from error
        except (TemplateLimitError, SecurityError) as error:
            raise RequestError(
                f"The chat template was stopped: {error.message}{_line_of(error)}.", param="chat_template"
            ) from error
        except jinja2.TemplateError as error:
            # Mostly `raise_exception` of a template that does not like the conversation.
            raise RequestError(
                f"The chat template refused {_message_of(error, variables, turns) or 'the messages'}: "
                f"{error.message}{_line_of(error)}",
                param="messages",
            ) from error
        except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
            place = _message_of(error, variables, turns)
            raise RequestError(
                f"The chat template failed{place and f' at {place}'}: {type(error).__name__}: "
                f"{error}{_line_of(error)}",
                param="chat_template",
            ) from error

    def _trial(self) -> Render:
        """Renders what find_traits asks for; all of it together stays within the limits of one rendering."""
        budget = WorkBudget()

        def tried(
            messages: list[dict[str, Any]],
            tools: list[dict[str, Any]] | None = None,
            documents: list[dict[str, Any]] | None = None,
        ) -> str | None:
            variables = {
                **self._special_tokens,
                "messages": messages,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": False,
            }
            try:
                return self._render(variables, budget=budget)
            except RequestError as error:
                if isinstance(error.__cause__, TemplateLimitError):
                    raise
                return None

        return tried

    def _does_write_role(self, role: str) -> bool:
        form = self.traits.user
        content = shaped_content(_ROLE_CANARY, takes_strings=form.takes_strings, takes_parts=form.takes_parts)
        conversation = [{"role": name, "content": content} for name in ("user", role)]
        prompt = self._trial()(conversation, None, None)
        return prompt is not None and prompt.count(_ROLE_CANARY) == 2


def _plain_tool(tool: Mapping[str, Any], *, takes_nulls: bool) -> dict[str, Any]:
    """A tool with vLLM's keys in vLLM's order; what is missing is null, or empty where the template needs it."""
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return dict(tool)
    description, parameters = function.get("description"), function.get("parameters")
    if not takes_nulls:
        description = description or ""
        parameters = parameters or {"type": "object", "properties": {}}
    named = {"name": function.get("name"), "description": description, "parameters": parameters}
    rest = {key: value for key, value in function.items() if key not in named}
    others = {key: value for key, value in tool.items() if key not in ("type", "function")}
    return {"type": tool.get("type", "function"), "function": {**named, **rest}, **others}


def _message_of(error: Exception, variables: Mapping[str, Any], turns: Sequence[Turn]) -> str:
    """Which message the template was at when it failed, as far as its variables tell; else nothing."""
    place = {id(message): turn for message, turn in zip(variables["messages"], turns, strict=False)}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_code.co_filename != _FILE:
            continue
        names = frame.f_locals
        found = [place[id(value)] for value in names.values() if id(value) in place]
        if id(names.get("message")) in place:  # what nearly every template calls it
            found = [place[id(names["message"])]]
        if found:
            turn = max(found, key=lambda turn: turn.index)
            return f'messages[{turn.index}] (role "{turn.role:.60}")'
    return ""


def _line_of(error: Exception) -> str:
    """Where in the template an error came from: jinja2 rewrites tracebacks to the template's own lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _FILE]
    return f" (line {lines[-1]})" if lines else ""


def _mark_final_text(conversation: list[dict[str, Any]]) -> str:
    """Put a mark behind the last message's text, in place, to find its end in the prompt.  The text."""
    content = conversation[-1]["content"]
    if content is None or isinstance(content, str):
        conversation[-1]["content"] = (content or "") + _END_MARK
        return content or ""
    if not content or content[-1]["type"] != "text":
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
