"""What a chat template writes out of a conversation, found out by rendering conversations with canaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Render = Callable[
    [list[dict[str, Any]], list[dict[str, Any]] | None, list[dict[str, Any]] | None], str | None
]
"""(messages, tools, documents) → the prompt, or None where the template refuses them."""

CallForm = Literal["beside", "split", "text"]
"""Where a message has text and calls: both in one message, in two, or the calls as a part of the text."""

_CANARY = "jaxservecanary"
_HELLO = "Hello."
_SHORT_ID, _LONG_ID = "call00001", "chatcmpl-tool-0123456789abcdef"


@dataclass(frozen=True, slots=True)
class ContentForm:
    """How the template takes the contents of one role's messages."""

    takes_strings: bool
    takes_parts: bool
    is_written: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTraits:
    """Each as seen from outside: the canary came out, or it did not."""

    user: ContentForm
    assistant: ContentForm
    system: ContentForm
    tool: ContentForm
    knows_developer: bool  # as the first message
    knows_later_developer: bool
    writes_later_system: bool  # beside the first message
    writes_system_before_results: bool  # where the last message is a tool's and no user's
    shows_tools: bool
    takes_bare_tools: bool  # those whose description and parameters are null
    shows_documents: bool
    shows_tool_calls: bool
    shows_tool_results: bool
    takes_argument_objects: bool
    takes_empty_text: bool  # beside calls; else the content must be null
    call_form: CallForm
    takes_parallel_calls: bool
    takes_long_ids: bool

    def form_of(self, role: str) -> ContentForm:
        """How a role's contents are taken; a role unknown here is treated as the user's."""
        forms = {"assistant": self.assistant, "system": self.system, "tool": self.tool}
        return forms.get(role, self.user)

    @property
    def shortcomings(self) -> tuple[str, ...]:
        """What the template cannot do, and what is done instead: a sentence each, for the operator."""
        told = {
            "it writes no system messages: they open the user's message": not self.system.is_written,
            "it writes no system messages but the first: others open the next user's message": (
                self.system.is_written and not self.writes_later_system
            ),
            "it does not show `tools`: they are described in the system message": not self.shows_tools,
            "it writes no tool calls: they become text of the assistant's message": not self.shows_tool_calls,
            "it writes no tool results: they become a user's message": not self.shows_tool_results,
            "it writes the system message for a user's last message alone: else it opens the user's first": (
                self.system.is_written and not self.writes_system_before_results
            ),
            "it takes one tool call a message: several are told one after another": not self.takes_parallel_calls,
            "it writes either text or tool calls: a message with both is told as two": (
                self.shows_tool_calls and self.call_form == "split"
            ),
            "it loses text beside tool calls: such calls and their results become text too": (
                self.shows_tool_calls and self.call_form == "text"
            ),
            "it takes tool call ids of nine characters: others are shortened": not self.takes_long_ids,
        }
        return tuple(sentence for sentence, is_so in told.items() if is_so)


def find_traits(
    render: Render, source: str, content_format: Literal["string", "openai"] | None
) -> TemplateTraits:
    """Some thirty short conversations are rendered; `content_format` decides about contents beforehand."""
    return _Probe(render, source, content_format).traits()


class _Probe:
    def __init__(
        self, render: Render, source: str, content_format: Literal["string", "openai"] | None
    ) -> None:
        self._render = render
        self._source = source
        self._decided = content_format
        self._user = self._form(lambda content: [{"role": "user", "content": content}])
        self._hello = {"role": "user", "content": _as(self._user, _HELLO)}

    def traits(self) -> TemplateTraits:
        assistant = self._form(lambda content: [self._hello, _message("assistant", content), self._hello])
        system = self._form(lambda content: [_message("system", content), self._hello])
        self._assistant = assistant
        takes_objects, shows_calls = self._arguments()
        self._arguments_given: Any = {_CANARY: 1} if takes_objects else f'{{"{_CANARY}": 1}}'
        empty, shows_calls = self._empty_text(shows_calls)
        self._empty = empty
        tool = self._form(lambda content: self._history(content, _SHORT_ID))
        developer = _message("developer", _as(system, _CANARY))
        knows_developer = "developer" in self._source and self._shows([developer, self._hello])
        shows_calls = shows_calls and self._shows_calls_later(tool)
        shows_results = tool.is_written and self._shows_results_later(tool)
        return TemplateTraits(
            user=self._user,
            assistant=assistant,
            system=system,
            tool=tool,
            knows_developer=knows_developer,
            knows_later_developer=knows_developer and self._shows_later("developer", system, assistant),
            writes_later_system=system.is_written and self._shows_later("system", system, assistant),
            writes_system_before_results=system.is_written
            and self._shows([_message("system", _as(system, _CANARY)), *self._asked(tool)]),
            shows_tools=self._shows(
                [self._hello], tools=[_tool(_CANARY, "d", {"type": "object", "properties": {}})]
            ),
            takes_bare_tools=self._shows([self._hello], tools=[_tool(_CANARY, None, None)]),
            shows_documents="documents" in self._source
            and self._shows(
                [self._hello], documents=[{"title": _CANARY, "text": _CANARY, "contents": _CANARY}]
            ),
            shows_tool_calls=shows_calls,
            shows_tool_results=shows_results,
            takes_argument_objects=takes_objects,
            takes_empty_text=empty is not None,
            call_form=self._call_form(tool, shows_results) if shows_calls else "text",
            takes_parallel_calls=not shows_calls or self._shows_parallel(tool, shows_results),
            takes_long_ids=not shows_results or self._shows(self._history(_as(tool, _CANARY), _LONG_ID)),
        )

    def _form(self, conversation: Callable[[Any], list[dict[str, Any]]]) -> ContentForm:
        """How the content of one message of a conversation is taken."""
        as_text = self._try(conversation(_CANARY))
        as_parts = self._try(conversation([{"type": "text", "text": _CANARY}] * 2))
        if self._decided is not None:
            takes_parts = self._decided == "openai"
            written = as_parts if takes_parts else as_text
            return ContentForm(not takes_parts, takes_parts, written is not None and _CANARY in written)
        takes_parts = _writes_bare(as_parts, times=2)
        takes_strings = not takes_parts or _writes_bare(as_text)
        return ContentForm(
            takes_strings, takes_parts, takes_parts or (as_text is not None and _CANARY in as_text)
        )

    def _arguments(self) -> tuple[bool, bool]:
        """Whether arguments are taken as objects, and whether they are written at all."""
        for content in (_as(self._assistant, ""), None):
            as_object, as_text = (
                self._try([self._hello, _calling(content, [_call(_SHORT_ID, "f", arguments)])])
                for arguments in ({_CANARY: 1}, f'{{"{_CANARY}": 1}}')
            )
            # 'x' is how Python writes an object that the template joins to a text.
            if as_object is not None and _CANARY in as_object and f"'{_CANARY}'" not in as_object:
                return True, True
            if as_text is not None and _CANARY in as_text:
                return False, True
        return True, False

    def _empty_text(self, shows_calls: bool) -> tuple[Any, bool]:
        """The content beside calls that the template wants where there is no text."""
        for content in (_as(self._assistant, ""), None):
            call = _call(_SHORT_ID, _CANARY, self._arguments_given)
            if shows_calls and self._shows([self._hello, _calling(content, [call])], times=2):
                return content, True
        return _as(self._assistant, ""), False

    def _history(self, result: Any, call_id: str) -> list[dict[str, Any]]:
        """A question, a call, and its result."""
        call = _call(call_id, "f", {} if isinstance(self._arguments_given, dict) else "{}")
        return [self._hello, _calling(self._empty, [call]), _result(call_id, result)]

    def _shows_calls_later(self, tool: ContentForm) -> bool:
        call = _call(_SHORT_ID, _CANARY, self._arguments_given)
        results = [_result(_SHORT_ID, _as(tool, _HELLO))] if tool.is_written else []
        answer = _message("assistant", _as(self._assistant, _HELLO))
        return self._shows(
            [self._hello, _calling(self._empty, [call]), *results, answer, self._hello], times=2
        )

    def _shows_results_later(self, tool: ContentForm) -> bool:
        answer = _message("assistant", _as(self._assistant, _HELLO))
        return self._shows([*self._history(_as(tool, _CANARY), _SHORT_ID), answer, self._hello])

    def _asked(self, tool: ContentForm) -> list[dict[str, Any]]:
        """A conversation whose last message is a tool's result."""
        return self._history(_as(tool, _HELLO), _SHORT_ID) if tool.is_written else [self._hello]

    def _shows_later(self, role: str, system: ContentForm, assistant: ContentForm) -> bool:
        """Whether a message of this role is written beside a first one and behind an answer."""
        first, second = _message("system", _as(system, _CANARY)), _message(role, _as(system, _CANARY))
        answer = _message("assistant", _as(assistant, _HELLO))
        return self._shows([first, second, self._hello], times=2) and self._shows(
            [first, self._hello, answer, second, self._hello], times=2
        )

    def _shows_parallel(self, tool: ContentForm, shows_results: bool) -> bool:
        ids = ("call00001", "call00002")
        calls = [_call(call_id, "f", self._arguments_given) for call_id in ids]
        results = [_result(call_id, _as(tool, _CANARY)) for call_id in ids] if shows_results else []
        times = len(calls) + len(results)
        return self._shows([self._hello, _calling(self._empty, calls), *results], times=times)

    def _call_form(self, tool: ContentForm, shows_results: bool) -> CallForm:
        """The first form in which a text, its call, and the answer to the result all come out."""
        call = _call(_SHORT_ID, "f", self._arguments_given)
        text = _as(self._assistant, _CANARY)
        end = [_message("assistant", text), self._hello]
        if shows_results:
            end.insert(0, _result(_SHORT_ID, _as(tool, _CANARY)))
        times = 2 + len(end) - 1
        if self._shows([self._hello, _calling(text, [call]), *end], times=times):
            return "beside"
        both = [_message("assistant", text), _calling(self._empty, [call])]
        return "split" if self._shows([self._hello, *both, *end], times=times) else "text"

    def _shows(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        times: int = 1,
    ) -> bool:
        """Whether canaries come out, `times` of them at least."""
        if tools is None and documents is None:
            prompt = self._try(messages)
        else:
            prompt = self._render(messages, tools, documents)
        return prompt is not None and prompt.count(_CANARY) >= times

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        """The prompt; some templates are for requests with tools or documents alone."""
        prompt = self._render(messages, None, None)
        if prompt is None and "tools" in self._source:
            prompt = self._render(messages, [_tool("f", "d", {"type": "object", "properties": {}})], None)
        if prompt is None and "documents" in self._source:
            prompt = self._render(messages, None, [{"title": "t", "text": "x"}])
        return prompt


def _writes_bare(prompt: str | None, times: int = 1) -> bool:
    """Whether the text came out as it is, so many times, and not as a part of a list or a JSON text."""
    return (
        prompt is not None
        and prompt.count(_CANARY) >= times
        and f"'{_CANARY}'" not in prompt
        and f'"{_CANARY}"' not in prompt
    )


def _as(form: ContentForm, text: str) -> Any:
    if form.takes_strings:
        return text
    return [{"type": "text", "text": text}] if text else []


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _calling(content: Any, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def _call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(call_id: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": "f", "content": content}


def _tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }
