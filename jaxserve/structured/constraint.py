"""Where one answer stands in its grammar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxserve.structured.blame import reason
from jaxserve.structured.compiler import CompiledGrammar, GrammarCompiler, take_forced

if TYPE_CHECKING:
    from llguidance import LLMatcher

# A grammar that compiles in less is compiled again for an answer that ran into a limit which it shares with others.
_QUICK = 0.05  # seconds
_MOST_FORCED = 64  # tokens taken ahead at a time: the step loop waits for it, of each answer


class ConstraintError(ValueError):
    """The answer cannot go on: the text says why.  Nobody else is concerned."""


class TokenConstraint:
    """The grammar's state after the tokens accepted so far.  For one thread.

    Tokens that the grammar forces are taken ahead of the answer, all at once: `forced` holds those that the answer
    does not have yet.  They are the ones that the tokenizer would write, and a function of the tokens before them.
    """

    def __init__(
        self, compiler: GrammarCompiler, grammar: str, compiled: CompiledGrammar, own_end_ids: Iterable[int]
    ) -> None:
        """`compiled` is the grammar's; `own_end_ids` are the tokens that end this answer.  Raises ConstraintError."""
        if compiled.matcher is None:
            raise ConstraintError(f"the grammar cannot be used: {reason(compiled.error)}")
        self.end_token_ids = compiler.end_token_ids
        # Under ignore_eos no token ends the answer: the grammar does, when nothing can follow.
        self.ends_itself = not set(self.end_token_ids) & set(own_end_ids)
        self._never_taken = {*self.end_token_ids, *own_end_ids}
        self.forced = list(compiled.forced)
        self.is_complete = False  # nothing can follow but the end
        self._compiler = compiler
        self._grammar = grammar
        self._may_start_over = compiled.seconds < _QUICK
        self._matcher = compiled.matcher.deep_copy()
        self._accepted = list(compiled.forced)
        self._look_for_end()

    @property
    def matcher(self) -> LLMatcher:
        """For computing the mask of the next token; only where nothing is forced."""
        assert not self.forced
        return self._matcher

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token.  Raises ConstraintError if the grammar does not allow it."""
        if self.forced:
            if token_id != self.forced.pop(0):
                raise ConstraintError("a token other than the one that the grammar forces was chosen.")
        else:
            self._accepted.append(token_id)
            if not self._matcher.consume_token(token_id):
                self.recover()
            if token_id not in self.end_token_ids:
                self._take_forced()
        self._look_for_end()

    def take_forced(self, least: int, most: int) -> list[int]:
        """Up to `most` of the forced tokens, which the answer has now; none if there are fewer than `least`.

        Never one that may end the answer: those must be sampled for it to end.
        """
        count = next((n for n, i in enumerate(self.forced) if i in self._never_taken), len(self.forced))
        if self.ends_itself and self._matcher.is_stopped():  # the last one ends it: it is sampled
            count = min(count, len(self.forced) - 1)
        count = min(count, most)
        if count < least:
            return []
        taken, self.forced = self.forced[:count], self.forced[count:]
        self._look_for_end()  # the end itself may be all that is left
        return taken

    def recover(self) -> None:
        """After an error of the matcher: try once with one that shares nothing.  Raises ConstraintError if in vain.

        Copies of a grammar share its automaton, and so the limit of its size: what one answer does to it another may
        feel.
        """
        if not self._may_start_over:
            why = reason(self._matcher.get_error())
            raise ConstraintError(f"the grammar cannot be followed any further: {why}")
        self._may_start_over = False
        self._compiler.forget(self._grammar)
        self._matcher = self._compiler.new_matcher(self._grammar)
        if not self._matcher.consume_tokens(self._accepted):
            self.recover()

    def _look_for_end(self) -> None:
        self.is_complete = not self.forced and self._matcher.is_stopped()

    def _take_forced(self) -> None:
        assert not self.forced
        self.forced = take_forced(self._matcher, _MOST_FORCED)
        self._accepted += self.forced
        if self._matcher.is_error():
            self.recover()
