"""Every built-in format of reasoning as a class with vLLM's interface, for plug-ins and tests that look for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from jaxserve.server.parser_api.class_registry import class_of_format
from jaxserve.server.parser_api.protocol import DeltaMessage
from jaxserve.server.parser_api.reasoning import ReasoningParser
from jaxserve.server.parser_api.requests import ChatCompletionRequest
from jaxserve.server.parser_api.thinking import DeepSeekR1ReasoningParser
from jaxserve.server.parsing.events import AnswerParser, Content, Event, Reasoning
from jaxserve.server.parsing.joining import add_text
from jaxserve.server.reasoning_parsers.reasoning_format import ReasoningFormat
from jaxserve.server.reasoning_parsers.registry import REASONING_FORMATS
from jaxserve.server.tool_parsers.harmony import HarmonyReasoning

# Whose templates open the reasoning in the prompt unless thinking is switched off: a parser that is not told the prompt
# takes it so, as vLLM's do.
_OPENED = frozenset(("qwen3", "seed_oss"))
_SWITCHES = ("enable_thinking", "thinking")  # of templates


class DeclaredReasoningParser(ReasoningParser):
    """Reads what its format declares.

    vLLM's interface does not say when a stream ends: what may still become a mark is held back until more text comes.
    """

    reasoning_format: ClassVar[ReasoningFormat | HarmonyReasoning]

    def __init__(
        self,
        tokenizer: Any,
        *args: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._prompt = self._usual_prompt(chat_template_kwargs or {})
        self._stream: AnswerParser | None = None
        self._num_read = 0  # characters of the streamed answer

    @property
    def reasoning_start_str(self) -> str | None:
        """The first of the marks that begin reasoning."""
        return next(iter(self.reasoning_format.starts), None)

    @property
    def reasoning_end_str(self) -> str | None:
        """The first of the marks that end reasoning."""
        return next(iter(self.reasoning_format.ends), None)

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        """The prompt's end tells whether the answer begins inside reasoning."""
        self._prompt = self._text(prompt_token_ids)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether the last mark, if there is any, is one that ends reasoning."""
        text, form = self._text(input_ids), self.reasoning_format
        start, end = (max(map(text.rfind, marks), default=-1) for marks in (form.starts, form.ends))
        return end > start

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens after the first that completes a mark that ends reasoning; nothing without one."""
        ends = self.reasoning_format.ends
        longest, tail = max(map(len, ends), default=0), ""
        for index, token_id in enumerate(input_ids, 1):
            piece = self._text([token_id])
            tail = tail[-longest:] + piece
            if any(end in tail for end in ends):
                return list(input_ids[index:])
        return []

    def extract_reasoning(
        self, model_output: str, request: ChatCompletionRequest | None
    ) -> tuple[str | None, str | None]:
        """The reasoning and the rest of a whole answer."""
        parser = self.reasoning_format.parser(self._prompt)
        delta = _told([*parser.push(model_output), *parser.finish()])
        return delta.reasoning, delta.content

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """What is new in an answer with one more piece; None: nothing yet.  An empty `previous_text` begins anew."""
        if self._stream is None or not previous_text:
            self._stream, self._num_read = self.reasoning_format.parser(self._prompt), 0
        text = current_text[self._num_read :]
        self._num_read += len(text)
        events = self._stream.push(text, delta_token_ids)
        return _told(events) if events else None

    extract_reasoning_content = extract_reasoning
    extract_reasoning_content_streaming = extract_reasoning_streaming

    def _usual_prompt(self, kwargs: Mapping[str, Any]) -> str:
        """The end of a prompt that a template with these arguments would write."""
        form = self.reasoning_format
        said = next((kwargs[name] for name in _SWITCHES if kwargs.get(name) is not None), None)
        if said is None:
            said = True if form.names[0] in _OPENED else None
        marks = {None: (), True: form.starts, False: form.ends}[None if said is None else bool(said)]
        return next(iter(marks), "")

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.model_tokenizer.decode(list(token_ids), skip_special_tokens=False)


def _told(events: Iterable[Event]) -> DeltaMessage:
    """The events as one message."""
    delta = DeltaMessage()
    for event in events:
        assert isinstance(event, Content | Reasoning), f"a format of reasoning tells no {event!r}"
        add_text(delta, event)
    return delta


@cache
def builtin_reasoning_parser(name: str) -> type[ReasoningParser] | None:
    """The class of a built-in format, the same for all of its names; None if there is none of this name."""
    entry = REASONING_FORMATS.get(name)
    if entry is None:
        return None
    if name == "deepseek_r1":  # which many a plug-in derives from: vLLM's own ways, where they are others
        return DeepSeekR1ReasoningParser
    if name != entry.names[0]:
        return builtin_reasoning_parser(entry.names[0])
    return class_of_format(name, DeclaredReasoningParser, reasoning_format=entry)


def builtin_reasoning_parsers() -> list[str]:
    """Their names."""
    return sorted(REASONING_FORMATS)
