"""Masks of the sequences that follow a grammar, computed on host threads while the device runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.engine.sampling_rows import allow_only, forbid, mask_words
from jaxserve.structured.constraint import ConstraintError, TokenConstraint

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher


@dataclass(slots=True)
class ConstraintMasks:
    """What became of each row that was asked for: a mask, nothing to sample, or an error."""

    masks: dict[int, np.ndarray] = field(default_factory=dict)  # [words] uint32
    complete: set[int] = field(default_factory=set)  # nothing can follow, and no token ends the answer
    errors: dict[int, ConstraintError] = field(default_factory=dict)


class MaskMaker:
    """Computes masks of `vocab_size` tokens, several rows at a time on threads that leave the interpreter alone."""

    def __init__(self, vocab_size: int) -> None:
        self._words = mask_words(vocab_size)

    def masks(self, constraints: Mapping[int, TokenConstraint]) -> ConstraintMasks:
        """The masks of rows: which tokens the grammar of each allows next."""
        made = ConstraintMasks()
        matchers: list[tuple[LLMatcher, int]] = []
        rows = list(constraints)
        masks = np.empty((len(rows), self._words), np.uint32)
        for index, row in enumerate(rows):
            constraint = constraints[row]
            if constraint.forced:
                allow_only(masks[index], constraint.forced[:1])
            else:
                matchers.append((constraint.matcher, index))
            made.masks[row] = masks[index]
        if matchers:
            self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, 4 * self._words, len(rows))
        for matcher, index in matchers:
            row = rows[index]
            if matcher.is_error():
                self._recover(constraints[row], row, made)
            if row in made.masks and constraints[row].ends_itself:
                forbid(made.masks[row], constraints[row].end_token_ids)
                if not made.masks[row].any():
                    constraints[row].is_complete = True
                    made.complete.add(row)
                    del made.masks[row]
        return made

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor()

    def _recover(self, constraint: TokenConstraint, row: int, made: ConstraintMasks) -> None:
        try:
            constraint.recover()
            mask = made.masks[row]
            constraint.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if constraint.matcher.is_error():
                constraint.recover()  # raises
        except ConstraintError as error:
            made.errors[row] = error
            del made.masks[row]
