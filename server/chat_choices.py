"""The choices of a chat answer, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import UNSET

from jaxserve.outputs import FINISH_STOP, CompletionOutput, Logprob
from jaxserve.server.answer_reader import AnswerReader
from jaxserve.server.answers import (
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
    FunctionDelta,
    Message,
    ToolCall,
    ToolCallDelta,
)
from jaxserve.server.conversation import echoed_text
from jaxserve.server.generation import Envelope
from jaxserve.server.logprobs import chat_logprobs
from jaxserve.server.parsing.events import CallArguments, CallStart, Content, Event, Reasoning
from jaxserve.server.prepared_chat import PreparedChat

ASSISTANT = "assistant"
FUNCTION = "function"
FINISH_TOOL_CALLS = "tool_calls"


@dataclass(slots=True)
class _Progress:
    """How far one streamed choice has come: its tokens that no chunk has told yet."""

    reader: AnswerReader
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


class ChatChoices:
    """Makes the choices of one request's answer out of what the engine gives."""

    def __init__(self, envelope: Envelope, prepared: PreparedChat) -> None:
        fields = prepared.taken.fields
        self.envelope = envelope
        self.prompt = prepared.prompt
        self.n = prepared.params.n
        self.num_prompt_logprobs = fields.prompt_logprobs
        self.echo = echoed_text(fields.messages) if fields.echo else ""
        self.told_prompt = prepared.prompt_text if fields.return_prompt_text else None
        self._num_top = (fields.top_logprobs or 0) if fields.logprobs else None
        self._tokenizer = envelope.state.llm.tokenizer
        self._has_parts = prepared.plan.has_parts
        self._new_reader = prepared.new_reader
        self._progress: dict[int, _Progress] = {}  # by index of the choice

    def whole(self, answer: CompletionOutput) -> ChatChoice:
        """One of the n answers."""
        assert answer.finish_reason is not None
        if self._has_parts:
            reader = self._new_reader()
            message = _message(reader.read(answer), self.echo)
            finish_reason = _finish_reason(answer.finish_reason, reader)
        else:
            message, finish_reason = Message(ASSISTANT, self.echo + answer.text), answer.finish_reason
        return ChatChoice(
            index=answer.index,
            message=message,
            logprobs=self._logprobs(answer.token_ids, answer.logprobs or []),
            finish_reason=finish_reason,
            stop_reason=UNSET if answer.stop_reason is None else answer.stop_reason,
            token_ids=answer.token_ids if self.envelope.return_token_ids else UNSET,
        )

    def opening(self, index: int) -> ChatChunkChoice:
        """What comes before any text: who speaks."""
        return ChatChunkChoice(index, Delta(ASSISTANT, ""))

    def pieces(self, answer: CompletionOutput) -> list[ChatChunkChoice]:
        """What is new in one of the n answers: a chunk a part, none while nothing can be told."""
        if self._has_parts:
            return self._parts(answer)
        piece = ChatChunkChoice(
            index=answer.index,
            delta=Delta(content=answer.text or UNSET),
            logprobs=self._logprobs(answer.token_ids, answer.logprobs or ()),
            finish_reason=answer.finish_reason,
            stop_reason=UNSET if answer.stop_reason is None else answer.stop_reason,
            token_ids=answer.token_ids if self.envelope.return_token_ids else UNSET,
        )
        return [piece]

    def _parts(self, answer: CompletionOutput) -> list[ChatChunkChoice]:
        """Tokens whose text is held back go with the next chunk, so that none is lost."""
        progress = self._progress.get(answer.index)
        if progress is None:
            progress = self._progress[answer.index] = _Progress(self._new_reader())
        progress.token_ids += answer.token_ids
        progress.logprobs += answer.logprobs or ()
        deltas = [_delta(event) for event in progress.reader.read(answer)]
        if not deltas:
            if answer.finish_reason is None:
                return []
            deltas = [Delta()]
        pieces = [ChatChunkChoice(answer.index, delta) for delta in deltas]
        first, last = pieces[0], pieces[-1]
        first.logprobs = self._logprobs(progress.token_ids, progress.logprobs)
        if self.envelope.return_token_ids:
            first.token_ids = progress.token_ids
        progress.token_ids, progress.logprobs = [], []
        if answer.finish_reason is not None:
            last.finish_reason = _finish_reason(answer.finish_reason, progress.reader)
            last.stop_reason = UNSET if answer.stop_reason is None else answer.stop_reason
        return pieces

    def _logprobs(
        self, token_ids: Sequence[int], positions: Sequence[dict[int, Logprob]]
    ) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        return chat_logprobs(
            token_ids, positions, self._num_top, self._tokenizer, as_ids=self.envelope.tokens_as_ids
        )


def _finish_reason(reason: str, reader: AnswerReader) -> str:
    """Calls are told as the reason only of an answer that came to its own end."""
    return FINISH_TOOL_CALLS if reason == FINISH_STOP and reader.has_calls else reason


def _message(events: Sequence[Event], echo: str) -> Message:
    """The parts put together; an answer of nothing else has content, be it empty."""
    content, reasoning = [echo], []
    calls: dict[int, tuple[CallStart, list[str]]] = {}
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(index):
                calls[index] = (event, [])
            case CallArguments(index, text):
                calls[index][1].append(text)
    said = "".join(content)
    message = Message(ASSISTANT, said if said or not (calls or reasoning) else None)
    if reasoning:
        message.reasoning = "".join(reasoning)
    if calls:
        message.tool_calls = [
            ToolCall(start.id, FUNCTION, CalledFunction(start.name, "".join(arguments)))
            for start, arguments in calls.values()
        ]
    return message


def _delta(event: Event) -> Delta:
    match event:
        case Content(text):
            return Delta(content=text)
        case Reasoning(text):
            return Delta(reasoning=text)
        case CallStart(index, call_id, name):
            start = ToolCallDelta(index, FunctionDelta(name=name), id=call_id, type=FUNCTION)
            return Delta(tool_calls=[start])
        case CallArguments(index, text):
            return Delta(tool_calls=[ToolCallDelta(index, FunctionDelta(arguments=text))])
