"""The choices of a chat answer, whole or piece by piece."""

from __future__ import annotations

from msgspec import UNSET

from jaxserve.inputs import TokenizedPrompt
from jaxserve.outputs import CompletionOutput
from jaxserve.server.answers import ChatChoice, ChatChunkChoice, ChatLogprobs, Delta, Message
from jaxserve.server.conversation import echoed_text
from jaxserve.server.generation import Envelope
from jaxserve.server.logprobs import chat_logprobs
from jaxserve.server.protocol import ChatRequest

ASSISTANT = "assistant"


class ChatChoices:
    """Makes the choices of one request's answer out of what the engine gives."""

    def __init__(self, envelope: Envelope, fields: ChatRequest, prompt: TokenizedPrompt, n: int) -> None:
        self.envelope = envelope
        self.prompt = prompt
        self.n = n
        self.num_prompt_logprobs = fields.prompt_logprobs
        self.echo = echoed_text(fields.messages) if fields.echo else ""
        self._num_top = (fields.top_logprobs or 0) if fields.logprobs else None
        self._tokenizer = envelope.state.llm.tokenizer

    def whole(self, answer: CompletionOutput) -> ChatChoice:
        """One of the n answers."""
        assert answer.finish_reason is not None
        return ChatChoice(
            index=answer.index,
            message=Message(ASSISTANT, self.echo + answer.text),
            logprobs=self._logprobs(answer),
            finish_reason=answer.finish_reason,
            stop_reason=UNSET if answer.stop_reason is None else answer.stop_reason,
            token_ids=answer.token_ids if self.envelope.return_token_ids else UNSET,
        )

    def opening(self, index: int) -> ChatChunkChoice:
        """What comes before any text: who speaks."""
        return ChatChunkChoice(index, Delta(ASSISTANT, ""))

    def piece(self, answer: CompletionOutput) -> ChatChunkChoice:
        """What is new in one of the n answers."""
        return ChatChunkChoice(
            index=answer.index,
            delta=Delta(content=answer.text or UNSET),
            logprobs=self._logprobs(answer),
            finish_reason=answer.finish_reason,
            stop_reason=UNSET if answer.stop_reason is None else answer.stop_reason,
            token_ids=answer.token_ids if self.envelope.return_token_ids else UNSET,
        )

    def _logprobs(self, answer: CompletionOutput) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        return chat_logprobs(
            answer.token_ids,
            answer.logprobs or [],
            self._num_top,
            self._tokenizer,
            as_ids=self.envelope.tokens_as_ids,
        )
