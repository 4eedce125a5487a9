"""Reasoning parsers that vLLM's plug-ins derive from: thinking between two tokens, or none at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxserve.server.parser_api.protocol import DeltaMessage
from jaxserve.server.parser_api.reasoning import ReasoningParser
from jaxserve.server.parser_api.requests import ChatCompletionRequest


class BaseThinkingReasoningParser(ReasoningParser):
    """Reasoning between two tokens, `start_token` and `end_token`, which a subclass names.

    The model may leave the start token out, since many templates put it into the prompt.

    Raises RuntimeError when the vocabulary has not both tokens, ValueError when they are not named.
    """

    @property
    def start_token(self) -> str:
        """The token before reasoning."""
        raise NotImplementedError(f"{type(self).__name__} does not implement start_token")

    @property
    def end_token(self) -> str:
        """The token after reasoning."""
        raise NotImplementedError(f"{type(self).__name__} does not implement end_token")

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        if tokenizer is None:
            raise ValueError(f"the model tokenizer must be passed to {type(self).__name__}")
        if not self.start_token or not self.end_token:
            raise ValueError(f"{type(self).__name__}: start_token and end_token must be defined")
        ids = [self.vocab.get(token) for token in (self.start_token, self.end_token)]
        if None in ids:
            raise RuntimeError(
                f"{type(self).__name__} could not locate think start/end tokens {self.start_token!r} and "
                f"{self.end_token!r} in the vocabulary"
            )
        self.start_token_id, self.end_token_id = (each for each in ids if each is not None)

    @property
    def reasoning_start_str(self) -> str | None:
        """The start token."""
        return self.start_token

    @property
    def reasoning_end_str(self) -> str | None:
        """The end token."""
        return self.end_token

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether the last of the two tokens, if any, is the end token."""
        marks = (self.start_token_id, self.end_token_id)
        return next((i == self.end_token_id for i in reversed(input_ids) if i in marks), False)

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether the end token has just come."""
        return self.end_token_id in delta_ids

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """What follows the first end token; nothing without one."""
        ids = list(input_ids)
        return ids[ids.index(self.end_token_id) + 1 :] if self.end_token_id in ids else []

    def extract_reasoning(
        self, model_output: str, request: ChatCompletionRequest
    ) -> tuple[str | None, str | None]:
        """Text before the end token is reasoning, all of it when there is none."""
        before, start, after = model_output.partition(self.start_token)
        reasoning, _, content = (after if start else before).partition(self.end_token)
        return reasoning, content or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """Reasoning from the start token to the end token, content after it, and where no start token came."""
        if tuple(delta_token_ids) in {(self.start_token_id,), (self.end_token_id,)}:
            return None
        has_begun = self.start_token_id in previous_token_ids
        if not has_begun and self.start_token_id not in delta_token_ids:
            return DeltaMessage(content=delta_text)
        if has_begun and self.end_token_id in previous_token_ids:
            return DeltaMessage(content=delta_text)
        if not has_begun:
            delta_text = delta_text.partition(self.start_token)[2] or delta_text
        return self._until_end(delta_text, delta_token_ids)

    extract_reasoning_content = extract_reasoning
    extract_reasoning_content_streaming = extract_reasoning_streaming

    def _until_end(self, text: str, token_ids: Sequence[int]) -> DeltaMessage:
        """Text inside of reasoning, and behind it if the end token is among the text's."""
        if self.end_token_id not in token_ids:
            return DeltaMessage(reasoning=text)
        reasoning, _, content = text.partition(self.end_token)
        return DeltaMessage(reasoning=reasoning, content=content or None)

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens between start and end tokens, nested ones included."""
        depth = count = 0
        for token_id in token_ids:
            if token_id == self.start_token_id:
                depth += 1
            elif token_id == self.end_token_id:
                depth = max(depth - 1, 0)
            elif depth:
                count += 1
        return count


class DeepSeekR1ReasoningParser(BaseThinkingReasoningParser):
    """`<think>` … `</think>`, where the model's answer may begin inside."""

    @property
    def start_token(self) -> str:
        """The token before reasoning."""
        return "<think>"

    @property
    def end_token(self) -> str:
        """The token after reasoning."""
        return "</think>"

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """Reasoning until the end token, whether or not a start token came; content after it."""
        delta = super().extract_reasoning_streaming(
            previous_text,
            current_text,
            delta_text,
            previous_token_ids,
            current_token_ids,
            delta_token_ids,
        )
        if delta is None or self.start_token_id in current_token_ids:
            return delta
        if self.end_token_id in previous_token_ids:
            return DeltaMessage(content=delta_text)
        return self._until_end(delta_text, delta_token_ids)


class IdentityReasoningParser(ReasoningParser):
    """No reasoning: all of an answer is content."""

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Always."""
        return True

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """All tokens."""
        return input_ids

    def extract_reasoning(
        self, model_output: str, request: ChatCompletionRequest
    ) -> tuple[str | None, str | None]:
        """No reasoning, and the answer."""
        return None, model_output

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """The new text as content."""
        return DeltaMessage(content=delta_text) if delta_text else None
