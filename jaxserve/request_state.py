"""One request in flight: its answers put together from the engine's tokens, as text, logprobs and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxserve.errors import JaxserveError, RequestError, RequestFailedError
from jaxserve.logprobs import LogprobsBuilder, prompt_logprobs
from jaxserve.observer import AnswerTimes
from jaxserve.outputs import FINISH_ABORT, FINISH_STOP, CompletionOutput, Logprob, RequestOutput
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.stop import StopChecker

if TYPE_CHECKING:
    from jaxserve.engine.protocol import CoreRequest, TokenLogprobs, TokenOutput
    from jaxserve.inputs import TokenizedPrompt
    from jaxserve.text.tokenizer import Tokenizer


class SequenceState:
    """One answer being put together from its tokens.

    Text may lag behind the tokens: half a character and what may begin a stop string are held back.
    """

    def __init__(
        self,
        index: int,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        arrival_time: float = 0.0,
    ) -> None:
        self.index = index
        self.times = AnswerTimes(arrival_time)
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None
        self.cumulative_logprob: float | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._text: list[str] = []
        self._num_taken_tokens = 0  # of token_ids, handed out
        self._num_taken_texts = 0  # of _text, handed out
        self._is_end_taken = False
        self._detokenizer = self._stop_checker = self._logprobs_builder = None
        if params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                prompt.token_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
                params.kept_special_tokens or (),
            )
            if params.stop:
                self._stop_checker = StopChecker(
                    params.stop or (), params.include_stop_str_in_output, params.min_tokens
                )
        if params.logprobs is not None:
            self.logprobs, self.cumulative_logprob = [], 0.0
            self._logprobs_builder = LogprobsBuilder(tokenizer if params.detokenize else None)

    def push(self, output: TokenOutput) -> None:
        """Take what one step gave.  Ends the answer at a stop string, dropping the tokens after it."""
        token_ids = output.token_ids
        num_spoken = len(token_ids)  # an end token belongs to the ids, not to the text
        ends_with_token = output.finish_reason == FINISH_STOP and not output.is_complete
        if ends_with_token and not self._params.include_stop_str_in_output:
            num_spoken -= 1
        for i, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            if self._logprobs_builder is not None and output.logprobs is not None:
                self._push_logprobs(output.logprobs[i])
            if i < num_spoken and self._detokenizer is not None:
                stop = self._push_text(self._detokenizer.push([token_id]))
                if stop is not None:
                    self.finish_reason, self.stop_reason = FINISH_STOP, stop
                    return
        if output.finish_reason is not None:
            self.finish(output.finish_reason, output.stop_token_id)

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """End the answer and release the text held back; half a character is never told."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._stop_checker is not None and (held := self._stop_checker.flush()):
            self._text.append(held)

    def has_news(self) -> bool:
        """Whether a delta would say something: new text, tokens that never get text, or the end."""
        if self.finish_reason is not None:
            return not self._is_end_taken
        if self._detokenizer is None:
            return len(self.token_ids) > self._num_taken_tokens
        return len(self._text) > self._num_taken_texts

    def take_delta(self) -> CompletionOutput:
        """What is new since the last delta.  Tokens whose text is held back come along with the next text."""
        output = self._snapshot(self._num_taken_tokens, self._num_taken_texts)
        self._num_taken_tokens, self._num_taken_texts = len(self.token_ids), len(self._text)
        self._is_end_taken = self.finish_reason is not None
        return output

    def take_all(self) -> CompletionOutput:
        """Everything so far."""
        self._text = ["".join(self._text)]
        return self._snapshot(0, 0)

    def _snapshot(self, first_token: int, first_text: int) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text="".join(self._text[first_text:]),
            token_ids=self.token_ids[first_token:],
            logprobs=None if self.logprobs is None else self.logprobs[first_token:],
            cumulative_logprob=self.cumulative_logprob,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _push_text(self, text: str) -> str | None:
        """Add one token's text; the stop string that it completes, if any."""
        stop = None
        if self._stop_checker is not None:
            text, stop = self._stop_checker.push(text)
        if text:
            self._text.append(text)
        return stop

    def _push_logprobs(self, position: TokenLogprobs) -> None:
        assert self._logprobs_builder is not None
        assert self.logprobs is not None
        self.logprobs.append(self._logprobs_builder.push(position))
        self.cumulative_logprob = (self.cumulative_logprob or 0.0) + position.logprob


class RequestState:
    """One request in flight: its prompt, the core requests it fanned out to, and the n answers so far."""

    def __init__(
        self,
        request_id: str,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        core_requests: Sequence[CoreRequest],
        tokenizer: Tokenizer,
    ) -> None:
        self.request_id = request_id
        self.core_requests = core_requests
        self.error: JaxserveError | None = None
        self._prompt = prompt
        self._params = params
        self._tokenizer = tokenizer
        self._sequences = [
            SequenceState(i, prompt, params, tokenizer, core.arrival_time)
            for i, core in enumerate(core_requests)
        ]
        self._untold_positions: Sequence[TokenLogprobs] | None = None  # of the prompt, until `tell_prompt`
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._num_cached_tokens = 0
        self._num_unfinished = len(core_requests)
        self._has_new_tokens = False
        self._is_prompt_taken = False  # prompt log-probabilities went out with a delta

    def let_pixels_go(self) -> None:
        """The request waits for the engine no longer."""
        if self._prompt.hold is not None:
            self._prompt.hold.release()

    def fail(self, output: TokenOutput) -> None:
        """Note the engine's error; a constraint's fault is told of the field in which it was sent."""
        assert output.error is not None
        param, constraint = output.error_param, self._params.structured_outputs
        if param == "structured_outputs" and constraint is not None:
            param = constraint.param
        self.error = (
            RequestFailedError(output.error) if param is None else RequestError(output.error, param=param)
        )

    @property
    def is_finished(self) -> bool:
        """Whether all answers have ended."""
        return self._num_unfinished == 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._prompt.token_ids)

    @property
    def params(self) -> SamplingParams:
        """What the request asked for."""
        return self._params

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that the prefix cache had; known from the first answer's first token on."""
        return self._num_cached_tokens

    def answer(self, index: int) -> SequenceState:
        """One of the n answers, as far as it has come."""
        return self._sequences[index]

    def push(self, index: int, output: TokenOutput) -> bool:
        """Take a step's output for answer `index`; True when that answer has ended."""
        sequence = self._sequences[index]
        self.let_pixels_go()
        if output.prompt_logprobs is not None:
            self._untold_positions = output.prompt_logprobs
        if index == 0:  # the others find their siblings' pages: only the first says what was there before
            self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        sequence.push(output)
        self._has_new_tokens = True
        if sequence.finish_reason is None:
            return False
        self._num_unfinished -= 1
        return True

    @property
    def num_untold_positions(self) -> int:
        """Positions of the prompt whose log-probabilities have come, and not been through `tell_prompt`."""
        return len(self._untold_positions or ())

    def tell_prompt(self) -> None:
        """Give the prompt's log-probabilities the shape of outputs, as `take` does unless it is done.

        On any thread: for a long prompt it takes tens of milliseconds, in which the others may `push`.
        """
        if self._untold_positions is not None:
            tokenizer = self._tokenizer if self._params.detokenize else None
            self._prompt_logprobs = prompt_logprobs(self._prompt.token_ids, self._untold_positions, tokenizer)
            self._untold_positions = None

    def abort(self) -> None:
        """End what still runs, keeping its text so far."""
        for sequence in self._sequences:
            if sequence.finish_reason is None:
                sequence.finish(FINISH_ABORT)
                self._num_unfinished -= 1
                self._has_new_tokens = True

    def take(self) -> RequestOutput | None:
        """The next RequestOutput of the kind asked for, or None while there is nothing to say.

        Raises the error that ended the request.
        """
        if self.error is not None:
            raise self.error
        finished = self.is_finished
        kind = self._params.output_kind
        if not self._has_new_tokens or (kind is OutputKind.FINAL_ONLY and not finished):
            return None
        self._has_new_tokens = False
        self.tell_prompt()
        if kind is OutputKind.DELTA:
            outputs = [sequence.take_delta() for sequence in self._sequences if sequence.has_news()]
            if not outputs:
                return None
        else:
            outputs = [sequence.take_all() for sequence in self._sequences]
        says_prompt = not (kind is OutputKind.DELTA and self._is_prompt_taken)
        self._is_prompt_taken = self._prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids,
            outputs=outputs,
            prompt_logprobs=self._prompt_logprobs if says_prompt else None,
            num_cached_tokens=self._num_cached_tokens,
            finished=finished,
        )
