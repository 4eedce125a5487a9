"""The choices of a plain completion, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.inputs import TokenizedPrompt
from jaxserve.outputs import FINISH_LENGTH, CompletionOutput, Logprob
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.answers import CompletionChoice, CompletionLogprobs
from jaxserve.server.generation import Envelope
from jaxserve.server.logprobs import completion_logprobs, prompt_logprobs
from jaxserve.server.protocol import CompletionRequest

PromptPositions = list[dict[int, Logprob] | None]


@dataclass(slots=True)
class Progress:
    """How far one choice has been told."""

    has_begun: bool = False
    num_tokens: int = 0
    text_offset: int = 0  # where the next token's text begins; counts an echoed prompt


class CompletionChoices:
    """Makes the choices of one request's answer out of what the engine gives.

    Choice i * n + j is answer j to prompt i.
    """

    def __init__(
        self,
        envelope: Envelope,
        fields: CompletionRequest,
        params: SamplingParams,
        prompts: Sequence[TokenizedPrompt],
    ) -> None:
        self.envelope = envelope
        self.prompts = prompts
        self.n = params.n
        self.is_prompt_only = bool(fields.echo) and fields.max_tokens == 0
        self.needs_prompt_logprobs = params.prompt_logprobs is not None
        self._fields = fields
        self._tokenizer = envelope.state.llm.tokenizer

    def num_positions(
        self, answer: CompletionOutput, progress: Progress, prompt_positions: PromptPositions | None
    ) -> int:
        """Positions whose log-probabilities the next piece of a choice tells."""
        of_prompt = 0 if progress.has_begun else len(prompt_positions or ())
        return of_prompt + len(answer.logprobs or ())

    def choice(
        self,
        prompt_index: int,
        answer: CompletionOutput,
        progress: Progress,
        prompt_positions: PromptPositions | None,
    ) -> CompletionChoice:
        """The next piece of a choice (all of it, if it is the only one); `progress` is brought up to date."""
        fields, prompt = self._fields, self.prompts[prompt_index]
        is_first, progress.has_begun = not progress.has_begun, True
        is_echoed = bool(fields.echo) and is_first
        token_ids, text = answer.token_ids, answer.text
        if self.is_prompt_only:
            token_ids, text = [], ""
        progress.num_tokens += len(token_ids)
        choice = CompletionChoice(
            index=prompt_index * self.n + answer.index,
            text=self._prompt_text(prompt) + text if is_echoed else text,
            logprobs=None,
            finish_reason=answer.finish_reason,
        )
        if fields.logprobs is not None:
            echoed = (prompt, prompt_positions or []) if is_echoed else None
            choice.logprobs = self._logprobs(
                fields.logprobs, token_ids, answer.logprobs or [], echoed, progress
            )
        if self.is_prompt_only:
            choice.finish_reason = FINISH_LENGTH
        elif answer.stop_reason is not None:
            choice.stop_reason = answer.stop_reason
        if self.envelope.return_token_ids:
            choice.token_ids = token_ids
            if is_first:
                choice.prompt_token_ids = prompt.token_ids
        if fields.prompt_logprobs is not None and prompt_positions is not None and is_first:
            choice.prompt_logprobs = prompt_logprobs(prompt_positions, fields.prompt_logprobs)
        return choice

    def _logprobs(
        self,
        num_top: int,
        token_ids: list[int],
        positions: list[dict[int, Logprob]],
        echoed: tuple[TokenizedPrompt, PromptPositions] | None,
        progress: Progress,
    ) -> CompletionLogprobs:
        all_ids, all_positions = token_ids, [*positions[: len(token_ids)]]
        if echoed is not None:
            prompt, prompt_positions = echoed
            all_ids, all_positions = [*prompt.token_ids, *all_ids], [*prompt_positions, *all_positions]
        logprobs, progress.text_offset = completion_logprobs(
            all_ids,
            all_positions,
            num_top,
            self._tokenizer,
            as_ids=self.envelope.tokens_as_ids,
            text_offset=progress.text_offset,
        )
        return logprobs

    def _prompt_text(self, prompt: TokenizedPrompt) -> str:
        """The prompt as it was written, or what its token ids say."""
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
