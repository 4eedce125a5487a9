"""One sequence being generated: host integers only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxserve.engine.image_positions import ImagePositions
from jaxserve.engine.pages import PageHash, hash_page, root_hash
from jaxserve.engine.protocol import CoreRequest, TokenLogprobs

if TYPE_CHECKING:
    from jaxserve.structured.constraint import TokenConstraint


class Sequence:
    """Tokens, pages and progress of one sequence.

    Scheduled and returned tokens are counted apart, since a step is planned before the one ahead of it has come back:
    `token_ids` holds what the host knows, `num_in_flight` counts tokens that were sampled by dispatched steps and
    are so far known to the device alone.
    """

    __slots__ = (
        "_hashes",
        "constraint",
        "images",
        "max_num_tokens",
        "needs_host",
        "num_cached_tokens",
        "num_in_flight",
        "num_planned_pages",
        "num_prompt_tokens",
        "num_registered_pages",
        "num_scheduled",
        "num_told",
        "pages",
        "prompt_logprobs",
        "request",
        "scheduled_time",
        "seq_id",
        "slot",
        "takes_forced",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        request: CoreRequest,
        max_model_len: int,
        constraint: TokenConstraint | None = None,
    ) -> None:
        self.seq_id = seq_id
        self.request = request
        self.token_ids = request.prompt_token_ids  # of all its answers, until `begin`
        self.num_prompt_tokens = len(self.token_ids)
        self.pages: list[int] = []
        self.num_registered_pages = 0  # leading pages that came from the prefix cache or were offered to it
        self.num_planned_pages = 0  # leading pages that the runner has been told of
        self.slot = -1  # row of the device's per-sequence state while running
        self.scheduled_time = 0.0  # time.monotonic() of the first admission; 0 before
        self.num_scheduled = 0  # positions whose keys and values are written or being written
        self.num_in_flight = 0
        # Prompt tokens found in the prefix cache, at first admission.
        self.num_cached_tokens: int | None = None
        # Read in every step, of every sequence, and made of what does not change.  needs_host: the next token's mask
        # depends on the last token, so that no step may be planned ahead.
        self.needs_host = any(len(ids) > 1 for ids in request.bad_word_ids)
        self.max_num_tokens = min(
            max_model_len, self.num_prompt_tokens + (request.params.max_tokens or max_model_len)
        )
        # Where the sequence stands in its grammar, if it follows one.
        self.constraint = constraint
        # Whether tokens that the grammar forces may enter without being sampled: nobody asks how likely they were,
        # nothing counts or forbids them.
        params = request.params
        self.takes_forced = constraint is not None and not (
            params.logprobs is not None
            or params.has_penalties
            or params.min_tokens
            or params.allowed_token_ids is not None
            or request.bad_word_ids
        )
        self.num_told = 0  # generated tokens that the front end has been told of
        # Of the prompt's tokens from the second on, as far as steps that scored them have come back.
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            None if request.params.prompt_logprobs is None else []
        )
        self._hashes: list[PageHash] = []
        self.images = ImagePositions(request.images) if request.images else None

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, on the host or on the device."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far, in flight or returned."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are still missing."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def order(self) -> tuple[int, float, int]:
        """Who goes first: low priority value, then early arrival."""
        return (self.request.priority, self.request.arrival_time, self.seq_id)

    def begin(self) -> None:
        """Have tokens of its own from now on: thousands of answers to one long prompt may wait."""
        if self.token_ids is self.request.prompt_token_ids:
            self.token_ids = [*self.token_ids, *self.take_forced(0, least=1)]

    def take_forced(self, num_new: int, least: int) -> list[int]:
        """Tokens that the grammar forces after `num_new` more, for the sequence to go on with unsampled.

        Fewer than `least` are not worth it.  One token is always left to be sampled: a sequence ends with a step.
        """
        if not self.takes_forced:
            return []
        assert self.constraint is not None
        room = self.max_num_tokens - len(self.token_ids) - num_new - 1
        return self.constraint.take_forced(least, max(room, 0))

    def tail_ids(self) -> tuple[int, ...]:
        """The newest generated tokens, as many as a bad word can look back on; empty if no mask needs them."""
        if not self.needs_host:
            return ()
        reach = max(len(ids) for ids in self.request.bad_word_ids) - 1
        return tuple(self.token_ids[max(self.num_prompt_tokens, len(self.token_ids) - reach) :])

    def finished_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """All prompt log-probabilities, once every position has run."""
        assert not self.wants_prompt_logprobs
        return self.prompt_logprobs

    def page_hashes(self, page_size: int) -> Iterator[PageHash]:
        """Names of the full pages of the tokens known to the host, in order; computed once each."""
        for index in range(len(self.token_ids) // page_size):
            if index == len(self._hashes):
                parent = self._hashes[-1] if self._hashes else root_hash(self.request.cache_salt)
                start = index * page_size
                if self.images is not None:
                    parent = self.images.mixed_into(parent, start, start + page_size)
                self._hashes.append(hash_page(parent, self.token_ids[start : start + page_size]))
            yield self._hashes[index]

    def page_hash(self, index: int, page_size: int) -> PageHash:
        """Name of full page `index`."""
        if index >= len(self._hashes):
            for _ in self.page_hashes(page_size):
                pass
        return self._hashes[index]
