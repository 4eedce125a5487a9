"""Grammars compiled off every loop, a few at a time, and kept: one compiler serves a front end and an engine."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.errors import RequestError, copied
from jaxserve.structured.blame import explain
from jaxserve.structured.grammar import grammar_text
from jaxserve.structured.limits import MAX_SECONDS, parser_limits
from jaxserve.structured.vocabulary import build_vocabulary
from jaxserve.structured.workers import Workers

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from jaxserve.structured_outputs import StructuredOutputsParams
    from jaxserve.text.tokenizer import Tokenizer

TIME_LIMIT = 5.0  # seconds that a caller waits for a grammar, those before it in the queue included
_CACHE_SIZE = 128  # grammars
_CACHE_CHARACTERS = 1 << 20  # of their texts together: a compiled one can take some hundred bytes for each
_NUM_FIRST_STEPS = 4
_WARM_UP = 'start: "<" /[a-z]+/ ">" %json {"type": "object", "properties": {"a": {"type": "string"}}}'
_MOST_FORCED = 4096  # tokens that answers begin with; what else is forced is found out behind them


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A matcher behind what every answer begins with, to be copied by whoever wants to advance it, or what is wrong."""

    matcher: LLMatcher | None
    error: str = ""
    forced: tuple[int, ...] = ()  # the tokens that every answer begins with, which the matcher has taken
    seconds: float = 0.0  # of processor time that it took


class GrammarCompiler:
    """Compiles each grammar once, on threads of its own.  Safe to call from any thread.

    Callers share what is compiled: a schema that many requests use is paid for once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_token_ids: Sequence[int],
        *,
        time_limit: float = TIME_LIMIT,
        cache_size: int = _CACHE_SIZE,
    ) -> None:
        """`vocab_size` is the model's; `end_token_ids` are all tokens that may end an answer."""
        self.time_limit = time_limit
        self.vocab_size = vocab_size
        self.end_token_ids = tuple(i for i in dict.fromkeys(end_token_ids) if 0 <= i < vocab_size)
        self._tokenizer = tokenizer
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Future[CompiledGrammar]] = OrderedDict()
        self._cache_characters = 0
        self._lock = threading.Lock()
        self._vocabulary: Future[LLTokenizer] | None = None
        self._workers = Workers("grammars")

    def warm_up(self) -> None:
        """Begin to prepare the vocabulary, and what else the first grammar would wait for."""
        if self.end_token_ids:
            with self._lock:
                vocabulary = self._begin_vocabulary()
            self._workers.submit(lambda: _compile(vocabulary.result(), _WARM_UP))

    def text(self, constraint: StructuredOutputsParams) -> str:
        """The constraint's grammar, by which `compile` knows it.  Raises RequestError: see grammar_text."""
        if not self.end_token_ids:
            raise RequestError(
                "structured output needs an end token, and this model names none.", param=constraint.param
            )
        return grammar_text(constraint, self._tokenizer, self.end_token_ids)

    def compile(self, grammar: str) -> Future[CompiledGrammar]:
        """The grammar compiled, now or soon.  What is wrong with it is in the result."""
        with self._lock:
            future = self._cache.get(grammar)
            if future is None:
                vocabulary = self._begin_vocabulary()
                future = self._workers.submit(lambda: _compile(vocabulary.result(), grammar))
                self._cache[grammar] = future
                self._cache_characters += len(grammar)
                while len(self._cache) > self._cache_size or (
                    self._cache_characters > _CACHE_CHARACTERS and len(self._cache) > 1
                ):
                    oldest, _ = self._cache.popitem(last=False)
                    self._cache_characters -= len(oldest)
            self._cache.move_to_end(grammar)
            return future

    def new_matcher(self, grammar: str) -> LLMatcher:
        """A matcher that shares nothing with others, compiled here and now; for a grammar that `compile` has taken."""
        from llguidance import LLMatcher

        with self._lock:
            vocabulary = self._begin_vocabulary()
        return LLMatcher(vocabulary.result(), grammar, limits=parser_limits(), log_level=0)

    def forget(self, grammar: str) -> None:
        """Compile it anew when it is next asked for: what copies share may have grown beyond its limits."""
        with self._lock:
            if self._cache.pop(grammar, None) is not None:
                self._cache_characters -= len(grammar)

    def check(self, constraint: StructuredOutputsParams) -> Future[RequestError | None]:
        """Compile a constraint for later.  The future has what is wrong with it, which must not be raised itself.

        A copy must: the future is kept beside the grammar, and what was raised keeps all that who raises it holds.
        """
        checked: Future[RequestError | None] = Future()
        checked.set_running_or_notify_cancel()  # whoever leaves cancels nothing: others may want it

        def finish(compiling: Future[CompiledGrammar]) -> None:
            """Runs on a worker, or here if it was compiled before."""
            try:
                said = compiling.result().error
                refusal = RequestError(explain(constraint, said), param=constraint.param) if said else None
            except BaseException as error:  # noqa: BLE001  # it is the future's, and raised there
                checked.set_exception(error)
            else:
                checked.set_result(refusal)

        def begin() -> None:
            try:
                compiling = self.compile(self.text(constraint))
            except RequestError as error:
                checked.set_result(copied(error))
            except BaseException as error:  # noqa: BLE001  # as above
                checked.set_exception(error)
            else:
                compiling.add_done_callback(finish)

        # Writing the text of a large schema takes milliseconds, too.
        self._workers.submit(begin)
        return checked

    def too_slow(self, constraint: StructuredOutputsParams) -> RequestError:
        """What to raise when a check took longer than the time limit."""
        return RequestError(
            f"the constraint took longer than {self.time_limit:g} s to compile; make it simpler.",
            param=constraint.param,
        )

    def _begin_vocabulary(self) -> Future[LLTokenizer]:
        if self._vocabulary is None:
            args = (self._tokenizer, self.vocab_size, self.end_token_ids)
            self._vocabulary = self._workers.submit(lambda: build_vocabulary(*args))
        return self._vocabulary


def take_forced(matcher: LLMatcher, most: int) -> list[int]:
    """Advance over the tokens that the grammar forces next, `most` of them; stops at an error of the matcher."""
    taken: list[int] = []
    while len(taken) < most and (forced := matcher.compute_ff_tokens()):
        # Of a long text they are the beginning, and then may come those of what stands behind it.
        forced = forced[: most - len(taken)]
        count = matcher.try_consume_tokens(forced)
        taken += forced[:count]
        if not count:
            break
    return taken


def _first_steps(matcher: LLMatcher, vocabulary: LLTokenizer) -> str:
    """Try what may come next: the error that it runs into, if any."""
    copy = matcher.deep_copy()
    for _ in range(_NUM_FIRST_STEPS):
        if copy.is_stopped():
            break
        mask = int.from_bytes(copy.compute_bitmask(), "little")
        token_id = (mask & -mask).bit_length() - 1  # the first that is allowed
        if copy.is_error() or token_id in vocabulary.eos_tokens:
            break
        copy.consume_token(token_id)
    return copy.get_error()


def _compile(vocabulary: LLTokenizer, grammar: str) -> CompiledGrammar:
    """Compile, and take the first steps, in which many a bad grammar fails."""
    from llguidance import LLMatcher

    start = time.thread_time()
    matcher = LLMatcher(vocabulary, grammar, limits=parser_limits(), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()  # finds what is forced, and unlike `compute_ff_tokens` without the interpreter's lock
    error = matcher.get_error() or _first_steps(matcher, vocabulary)
    # Here rather than for every answer: it takes milliseconds for a thousand tokens.
    forced = () if error else tuple(take_forced(matcher, _MOST_FORCED))
    error = error or matcher.get_error() or (_first_steps(matcher, vocabulary) if forced else "")
    if error:
        return CompiledGrammar(None, error)
    # Of the processor: what else the machine does is not held against it.
    seconds = time.thread_time() - start
    if seconds > MAX_SECONDS:
        return CompiledGrammar(None, f"it is too complex: it took {seconds:.1f} s to compile")
    matcher.compute_ff_tokens()  # kept in the matcher, and so by its copies
    return CompiledGrammar(matcher, forced=forced, seconds=seconds)
