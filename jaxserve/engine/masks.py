"""Which tokens a row may take in this step: allowed_token_ids, bad words, min_tokens, as bit masks made on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxserve.engine.plan import PlanEntry
from jaxserve.engine.protocol import CoreRequest
from jaxserve.engine.sampling_rows import allow_all, allow_only, forbid, mask_words


class MaskBook:
    """A request's fixed mask per slot, and the step's own additions."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._words = mask_words(vocab_size)
        self._requests: list[CoreRequest | None] = [None] * num_slots
        self._fixed: list[np.ndarray | None] = [None] * num_slots
        self._constrained: set[int] = set()  # slots whose request may ever need a mask
        self._stuck: set[int] = set()  # slots whose fixed mask leaves no token

    def rows(self, entries: Sequence[PlanEntry]) -> tuple[dict[int, np.ndarray], tuple[int, ...]]:
        """Masks of the entries that need one in this step, by the entry's index, and those that leave no token."""
        if not self._constrained:
            return {}, ()
        made = {row: self.row(entry) for row, entry in enumerate(entries) if entry.slot in self._constrained}
        masks = {row: mask for row, mask in made.items() if mask is not None}
        return masks, tuple(row for row, mask in masks.items() if self._is_stuck(entries[row].slot, mask))

    def admit(self, slot: int, request: CoreRequest) -> None:
        """The slot belongs to `request` from now on."""
        self._requests[slot] = request
        self._fixed[slot] = None
        self._stuck.discard(slot)
        params = request.params
        if params.allowed_token_ids is None and not request.bad_word_ids and not params.min_tokens:
            self._constrained.discard(slot)
            return
        self._constrained.add(slot)
        banned = [ids[0] for ids in request.bad_word_ids if len(ids) == 1]
        if params.allowed_token_ids is None and not banned:
            return
        mask = np.empty(self._words, np.uint32)
        if params.allowed_token_ids is None:
            allow_all(mask)
        else:
            allow_only(mask, params.allowed_token_ids)
        forbid(mask, banned)
        self._fixed[slot] = mask
        if not mask.any():
            self._stuck.add(slot)

    def row(self, entry: PlanEntry) -> np.ndarray | None:
        """The mask of an entry that samples, [words] uint32; None if it may take any token."""
        if not entry.samples:
            return None
        request = self._requests[entry.slot]
        assert request is not None
        banned: list[int] = []
        if entry.num_generated < request.params.min_tokens:
            banned += (*request.eos_token_ids, *request.stop_token_ids)
        for ids in request.bad_word_ids:
            if len(ids) > 1 and entry.tail_ids[-(len(ids) - 1) :] == ids[:-1]:
                banned.append(ids[-1])
        fixed = self._fixed[entry.slot]
        if not banned:
            return fixed
        mask = np.empty(self._words, np.uint32)
        if fixed is None:
            allow_all(mask)
        else:
            mask[:] = fixed
        forbid(mask, banned)
        return mask

    def stack(self, rows: dict[int, np.ndarray], num_rows: int) -> np.ndarray:
        """Masks [num_rows, words] with everything allowed in the rows that are not given."""
        masks = np.empty((num_rows, self._words), np.uint32)
        allow_all(masks)
        for row, mask in rows.items():
            masks[row] = mask
        return masks

    def _is_stuck(self, slot: int, mask: np.ndarray) -> bool:
        """Whether a mask of the slot's leaves no token."""
        return slot in self._stuck if mask is self._fixed[slot] else not mask.any()


def intersect(
    masks: Mapping[int, np.ndarray], more: Mapping[int, np.ndarray]
) -> tuple[dict[int, np.ndarray], tuple[int, ...]]:
    """Both sets of masks together, and the rows to which they leave nothing; those get no mask."""
    both = {**masks, **more}
    for row in masks.keys() & more.keys():
        both[row] = masks[row] & more[row]
    stuck = tuple(row for row in more if not both[row].any())
    return {row: mask for row, mask in both.items() if row not in stuck}, stuck
