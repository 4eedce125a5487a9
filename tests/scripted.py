"""A scripted engine core behind the real EngineClient face: says what a script tells it, a step at a time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxserve.engine.protocol import CoreRequest, EngineInfo, EngineStats, TokenLogprobs, TokenOutput
from jaxserve.errors import EngineDeadError
from tests.patience import PATIENCE

Script = Callable[[CoreRequest], Sequence[int]]


def echo(request: CoreRequest) -> Sequence[int]:
    """Say the prompt back."""
    return request.prompt_token_ids


def saying(token_ids: Sequence[int]) -> Script:
    """Say these tokens, whatever is asked: `saying(tokenizer.encode("Paris.", add_special_tokens=False))`."""
    return lambda request: token_ids


def drawing(choices: Sequence[int], count: int) -> Script:
    """Say `count` tokens drawn by the request's seed; at temperature 0 the first choice, `count` times."""

    def script(request: CoreRequest) -> Sequence[int]:
        if request.params.is_greedy:
            return [choices[0]] * count
        return random.Random(request.params.seed).choices(choices, k=count)

    return script


def scripted_info(**changes: object) -> EngineInfo:
    """An EngineInfo of a small model; any field can be changed."""
    fields: dict[str, object] = {
        "model": "scripted",
        "vocab_size": 262,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "page_size": 16,
        "num_pages": 128,
        "max_logprobs": 20,
        "dtype": "float32",
        "device": "cpu",
    }
    return EngineInfo(**{**fields, **changes})  # pyright: ignore[reportArgumentType]  # values are checked by use


def scripted_logprobs(token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """Log-probabilities made from the token id: even tokens are the likeliest ones, odd ones come second."""
    rank = 1 + token_id % 2
    others = [(token_id + i) % vocab_size for i in range(1, num_top + 1)]
    top_ids = [*others[: rank - 1], token_id, *others[rank - 1 :]][:num_top]
    return TokenLogprobs(
        token_id=token_id,
        logprob=-0.5 * rank,
        rank=rank,
        top_ids=top_ids,
        top_logprobs=[-0.5 * (i + 1) for i in range(len(top_ids))],
    )


@dataclass
class _Running:
    request: CoreRequest
    script: Sequence[int] = ()
    token_ids: list[int] = field(default_factory=list)
    scheduled_time: float = field(default_factory=time.monotonic)


class ScriptedClient:
    """An EngineClient whose answers are known beforehand.

    - `script(request)` gives the tokens of an answer; then the end token comes, or, under ignore_eos (no
      eos_token_ids), the script again.  max_tokens, min_tokens, stop_token_ids, eos_token_ids are honoured.
      A ValueError from the script fails that request alone, with its text as the error.
    - Each step gives every running sequence `tokens_per_step` tokens; at most info.max_num_seqs run at once.
    - `stall()` holds the steps back, `step(n)` lets n of them happen, `resume()` lets them run freely.
    - `fail(request_id, message)` fails one request; `die(error)` ends the engine.
    - `submitted` and `aborted` record the calls; `wait_until(condition)` waits for the engine's thread.
    """

    def __init__(
        self,
        script: Script = echo,
        *,
        info: EngineInfo | None = None,
        tokens_per_step: int = 1,
        num_cached_tokens: int = 0,
        stalled: bool = False,
    ) -> None:
        self.info = info or scripted_info()
        self.submitted: list[CoreRequest] = []
        self.aborted: list[str] = []  # core request ids
        self.num_steps = 0
        self._script = script
        self._tokens_per_step = tokens_per_step
        self._num_cached_tokens = num_cached_tokens
        self._steps_left: int | None = 0 if stalled else None  # None: no limit
        self._changed = threading.Condition()
        self._waiting: list[CoreRequest] = []
        self._running: dict[str, _Running] = {}
        self._failures: dict[str, str] = {}
        self._death: Exception | None = None
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def start(
        self, on_outputs: Callable[[Sequence[TokenOutput]], None], on_dead: Callable[[Exception], None]
    ) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(on_outputs, on_dead), name="scripted-engine", daemon=True
        )
        self._thread.start()

    def submit(self, requests: Sequence[CoreRequest]) -> None:
        with self._changed:
            if self._death is not None or self._is_stopped:
                raise EngineDeadError(f"the scripted engine is dead: {self._death}")
            self.submitted.extend(requests)
            self._waiting.extend(requests)
            self._waiting.sort(key=lambda request: request.priority)
            self._admit()
            self._changed.notify_all()

    def abort(self, request_ids: Sequence[str]) -> None:
        with self._changed:
            self.aborted.extend(request_ids)
            for request_id in request_ids:
                self._running.pop(request_id, None)
            self._waiting = [r for r in self._waiting if r.request_id not in request_ids]
            self._changed.notify_all()

    def stats(self) -> EngineStats:
        with self._changed:
            size = self.info.page_size
            held = sum(
                -(-(len(r.request.prompt_token_ids) + len(r.token_ids)) // size)
                for r in self._running.values()
            )
            return EngineStats(
                num_running=len(self._running),
                num_waiting=len(self._waiting),
                num_pages=self.info.num_pages,
                num_free_pages=self.info.num_pages - held,
                num_steps=self.num_steps,
            )

    def reset_prefix_cache(self) -> bool:
        return not self._running

    def shutdown(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive()

    @property
    def num_unfinished(self) -> int:
        """Sequences running or waiting: 0 says that every page is free."""
        return len(self._running) + len(self._waiting)

    def stall(self) -> None:
        """Hold the steps back from here on."""
        with self._changed:
            self._steps_left = 0

    def step(self, count: int = 1) -> None:
        """Let `count` more steps happen and wait until they have (each needs a sequence to work on)."""
        with self._changed:
            self._steps_left = (self._steps_left or 0) + count
            self._changed.notify_all()
        self.wait_until(lambda: self._steps_left == 0)

    def resume(self) -> None:
        """Let the steps run freely."""
        with self._changed:
            self._steps_left = None
            self._changed.notify_all()

    def fail(self, request_id: str, message: str) -> None:
        """Fail one core request at the next step."""
        with self._changed:
            self._failures[request_id] = message
            self._changed.notify_all()

    def die(self, error: Exception | None = None) -> None:
        """End the engine: on_dead is called from its thread, stalled or not."""
        with self._changed:
            self._death = error or RuntimeError("scripted death")
            self._changed.notify_all()

    def wait_until(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        """Block until `condition` holds; it is looked at whenever the engine's state changes."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise TimeoutError("the scripted engine never reached the awaited state")

    def _run(
        self, on_outputs: Callable[[Sequence[TokenOutput]], None], on_dead: Callable[[Exception], None]
    ) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._is_stopped:
                    return
                if self._death is not None:
                    break
                outputs = self._step()
            # Outside the lock: a callback may call submit or abort.  The step counts once it is delivered.
            if outputs:
                on_outputs(outputs)
            with self._changed:
                self.num_steps += 1
                if self._steps_left:
                    self._steps_left -= 1
                self._changed.notify_all()
        on_dead(self._death)

    def _has_work(self) -> bool:
        if self._is_stopped or self._death is not None:
            return True
        return self._steps_left != 0 and bool(self._waiting or self._running)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.info.max_num_seqs:
            request = self._waiting.pop(0)
            running = self._running[request.request_id] = _Running(request)
            try:
                running.script = self._script(request)
            except ValueError as error:
                self._failures[request.request_id] = str(error)

    def _step(self) -> list[TokenOutput]:
        self._admit()
        outputs = []
        for running in list(self._running.values()):
            output = self._advance(running)
            if output.finish_reason is not None or output.error is not None:
                del self._running[output.request_id]
            outputs.append(output)
        return outputs

    def _advance(self, running: _Running) -> TokenOutput:
        request = running.request
        message = self._failures.pop(request.request_id, None)
        if message is not None:
            return TokenOutput(request_id=request.request_id, token_ids=[], error=message)
        is_first = not running.token_ids
        new_ids: list[int] = []
        finish_reason = stop_token_id = None
        while finish_reason is None and len(new_ids) < self._tokens_per_step:
            token_id = self._next_token(running)
            running.token_ids.append(token_id)
            new_ids.append(token_id)
            finish_reason, stop_token_id = self._finish_reason(running, token_id)
        params = request.params
        logprobs = prompt_logprobs = None
        if params.logprobs is not None:
            logprobs = [scripted_logprobs(i, params.logprobs, self.info.vocab_size) for i in new_ids]
        if params.prompt_logprobs is not None and is_first:
            prompt_logprobs = [
                scripted_logprobs(i, params.prompt_logprobs, self.info.vocab_size)
                for i in request.prompt_token_ids[1:]
            ]
        return TokenOutput(
            request_id=request.request_id,
            token_ids=new_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=self._num_cached_tokens,
            scheduled_time=running.scheduled_time,
            time=time.monotonic(),
        )

    def _next_token(self, running: _Running) -> int:
        script, eos = running.script, running.request.eos_token_ids
        num_said = len(running.token_ids)
        may_end = num_said >= max(len(script), running.request.params.min_tokens)
        if eos and (may_end or not script):
            return eos[0]
        return script[num_said % len(script)]

    def _finish_reason(self, running: _Running, token_id: int) -> tuple[str | None, int | None]:
        params, num_said = running.request.params, len(running.token_ids)
        if num_said >= params.min_tokens:
            if token_id in running.request.eos_token_ids:
                return "stop", None
            if token_id in running.request.stop_token_ids:
                return "stop", token_id
        assert params.max_tokens is not None
        total = num_said + len(running.request.prompt_token_ids)
        if num_said >= params.max_tokens or total >= self.info.max_model_len:
            return "length", None
        return None, None
