"""Which sequences run in the next step, with how many tokens: continuous batching under a token budget."""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.engine.image_planner import ImagePlanner
from jaxserve.engine.pages import PageAllocator
from jaxserve.engine.plan import ON_DEVICE, Admission, PlanEntry, StepPlan, StepResult
from jaxserve.engine.protocol import CoreRequest, TokenOutput
from jaxserve.engine.sequence import Sequence
from jaxserve.outputs import FINISH_LENGTH, FINISH_STOP

if TYPE_CHECKING:
    from jaxserve.structured.constraint import TokenConstraint

_MIN_DROPPED = 64  # ended sequences that the waiting heap may always hold


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since start."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_steps: int = 0


class Scheduler:
    """Owns the sequences, their slots and pages.  `schedule` plans a step, `commit` takes its result.

    Several plans may be out at once: device steps run in the order they were dispatched, so a page may be given away
    while an earlier step still writes to it, and a token that is still in flight may be the next step's input.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_size: int,
        max_num_seqs: int,
        token_budget: int,
        scoring_budget: int,
        max_model_len: int,
        chunk_rows: int = 0,
        images: ImagePlanner | None = None,
    ) -> None:
        """A step has at most `token_budget` tokens, and `scoring_budget` if any prompt is scored in it.

        Neither may be less than `max_num_seqs`.  Up to `chunk_rows` tokens, steps with chunks of several tokens take no
        longer than others.  Without `images`, no request may have any.
        """
        self.burst_steps = 1  # decode steps that a plan may hold; whoever steps the engine sets it (pace.py)
        self.allocator = allocator
        self.counters = SchedulerCounters()
        self._page_size = page_size
        self._token_budget = token_budget
        self._scoring_budget = min(scoring_budget, token_budget)
        self._chunk_rows = chunk_rows
        self._max_model_len = max_model_len
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._running: list[Sequence] = []  # in Sequence.order
        self._waiting: list[tuple[tuple[int, float, int], Sequence]] = []  # heap; ended ones leave it late
        self._num_dropped = 0  # ended sequences still in the heap
        self._by_id: dict[str, Sequence] = {}
        self._by_seq_id: dict[int, Sequence] = {}
        self._next_seq_id = 0
        self._num_constrained = 0
        self._images = images

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._by_id) - len(self._running)

    @property
    def image_cache_counts(self) -> tuple[int, int]:
        """Images that sequences have begun with, and of them those that were encoded already."""
        return (0, 0) if self._images is None else (self._images.num_queries, self._images.num_hits)

    def add(self, request: CoreRequest, constraint: TokenConstraint | None = None) -> None:
        """Queue a request whose prompt and pages fit (the front end checked the length), with its grammar's state."""
        assert request.request_id not in self._by_id, f"request {request.request_id} is already here"
        assert 0 < len(request.prompt_token_ids) < self._max_model_len
        assert self._images is not None or not request.images, "the model takes text only"
        seq = Sequence(self._next_seq_id, request, self._max_model_len, constraint)
        self._num_constrained += constraint is not None
        self._next_seq_id += 1
        self._by_id[request.request_id] = seq
        self._by_seq_id[seq.seq_id] = seq
        heapq.heappush(self._waiting, (seq.order, seq))

    def abort(self, request_id: str) -> bool:
        """Drop a request; its pages are free at once.  False if it is not here (any more)."""
        seq = self._by_id.get(request_id)
        if seq is None:
            return False
        self._finish(seq)
        return True

    def request_of(self, entry: PlanEntry) -> CoreRequest | None:
        """Whose entry it is; None if the request is not here any more."""
        seq = self._by_seq_id.get(entry.seq_id)
        return None if seq is None else seq.request

    @property
    def has_room_for_chunks(self) -> bool:
        """Whether a step of all that runs takes no longer for a chunk of a few tokens."""
        return self.num_running < self._chunk_rows

    def constrained(self, plan: StepPlan) -> dict[int, Sequence]:
        """The sequences that follow a grammar and sample in a plan, by the entry's index."""
        if not self._num_constrained:
            return {}
        entries = [
            (index, self._by_seq_id.get(entry.seq_id))
            for index, entry in enumerate(plan.entries)
            if entry.samples
        ]
        return {index: seq for index, seq in entries if seq is not None and seq.constraint is not None}

    def schedule(self) -> StepPlan | None:
        """The next step, or None if no sequence can advance before a step in flight comes back."""
        # One bucket of forward passes keeps the hidden states of all its tokens.
        scores = any(_scores_next(seq) for seq in self._running)
        budget = whole_budget = self._scoring_budget if scores else self._token_budget
        if self._images is not None:
            self._images.begin_step()
        planned: dict[int, PlanEntry] = {}  # seq_id -> entry
        admissions: list[Admission] = []
        preemptions_before = self.counters.num_preemptions
        lacking: list[Sequence] = []  # who found too few pages
        # Decodes first: a long prompt must not stall the answers that are already streaming.
        chunks: list[Sequence] = []
        for seq in self._running.copy():
            count = min(self._num_schedulable(seq), budget)
            if count > 1:
                chunks.append(seq)
            elif count and seq.slot >= 0 and self._reach(seq, seq.num_scheduled, 1):
                if self._grow(seq, 1, planned):
                    planned[seq.seq_id] = self._plan_entry(seq, 1)
                    budget -= 1
                else:
                    lacking.append(seq)
        for seq in chunks:
            count = min(self._num_schedulable(seq), budget)
            spare = self._chunk_rows - (whole_budget - budget)
            if planned and spare > 0 and seq.num_scheduled >= seq.num_prompt_tokens:
                count = min(count, spare)  # of forced tokens: so many hold nobody up
            if count and seq.slot >= 0:
                count = self._reach(seq, seq.num_scheduled, count)
            if count and seq.slot >= 0:
                if self._grow(seq, count, planned):
                    planned[seq.seq_id] = self._plan_entry(seq, count)
                    budget -= count
                else:
                    lacking.append(seq)
        if self.counters.num_preemptions == preemptions_before:
            # Those whose image the tower has no time for in this step; a slot is kept for each.
            set_aside: list[Sequence] = []
            while budget and len(self._free_slots) > len(set_aside):
                seq = self._pop_waiting()
                if seq is None:
                    break
                if seq.wants_prompt_logprobs and not scores:
                    # What is planned already must fit, too; if it does not, those before it have a step first.
                    scores = True
                    budget -= self._token_budget - self._scoring_budget
                # Newcomers would take one by one the pages that a long prompt's next chunk needs at once.
                is_behind = any(other.order < seq.order for other in lacking)
                count = self._admit(seq, budget) if budget > 0 and not is_behind else None
                if count is None:
                    heapq.heappush(self._waiting, (seq.order, seq))
                    break
                if not count:
                    set_aside.append(seq)
                    continue
                admissions.append(
                    Admission(slot=seq.slot, request=seq.request, token_ids=tuple(seq.token_ids))
                )
                entry = planned[seq.seq_id] = self._plan_entry(seq, count)
                budget -= len(entry.token_ids)
            for seq in set_aside:
                heapq.heappush(self._waiting, (seq.order, seq))
        if not planned:
            if self._images is not None:
                self._images.take_back()
            return None
        entries = sorted(planned.values(), key=lambda entry: len(entry.token_ids) > 1)
        num_steps = 1
        if self.burst_steps > 1 and not admissions:
            num_steps = self._extend_to_burst(entries)
        self.counters.num_steps += num_steps
        return StepPlan(
            admissions=tuple(admissions),
            entries=tuple(entries),
            num_steps=num_steps,
            encodes=() if self._images is None else self._images.encodes(),
        )

    def commit(
        self, plan: StepPlan, result: StepResult, forced: Mapping[int, list[int]] | None = None
    ) -> list[TokenOutput]:
        """Take a step's tokens: append, register full pages, finish what is done.

        `forced`: tokens that follow those of an entry without being sampled.  What a later step would have sampled in
        their place is not awaited any more.
        """
        outputs = []
        now = time.monotonic()
        for index, entry in enumerate(plan.entries):
            seq = self._by_seq_id.get(entry.seq_id)
            if seq is None:
                continue  # finished or aborted while the step was in flight
            if entry.prompt_targets:
                assert seq.prompt_logprobs is not None
                assert entry.start <= len(seq.prompt_logprobs)  # those before it are there
                seq.prompt_logprobs[entry.start : entry.start + len(entry.prompt_targets)] = (
                    result.prompt_logprobs[index]
                )
            if not entry.samples:
                continue
            seq.num_in_flight -= entry.num_steps
            is_first = not seq.num_told
            token_ids = result.token_ids[index]
            finish_reason, stop_token_id = None, None
            for count, token_id in enumerate(token_ids, 1):
                seq.token_ids.append(token_id)
                finish_reason, stop_token_id = self._finish_reason(seq, token_id)
                if finish_reason is not None:  # what a burst has sampled after the end is nobody's
                    token_ids = token_ids[:count]
                    break
            is_complete = False
            if seq.constraint is not None:
                if forced and index in forced and finish_reason is None:
                    seq.token_ids += forced[index]
                    seq.num_in_flight = 0
                token_ids = seq.token_ids[seq.num_prompt_tokens + seq.num_told :]
                if finish_reason is None and seq.constraint.ends_itself and seq.constraint.is_complete:
                    finish_reason, is_complete = FINISH_STOP, True
            seq.num_told += len(token_ids)
            self._register_pages(seq)
            logprobs = result.logprobs[index]
            outputs.append(
                TokenOutput(
                    request_id=seq.request.request_id,
                    token_ids=token_ids,
                    logprobs=None if logprobs is None else logprobs[: len(token_ids)],
                    prompt_logprobs=seq.finished_prompt_logprobs() if is_first else None,
                    finish_reason=finish_reason,
                    stop_token_id=stop_token_id,
                    is_complete=is_complete,
                    num_cached_tokens=seq.num_cached_tokens or 0,
                    scheduled_time=seq.scheduled_time,
                    time=now,
                )
            )
            if finish_reason is not None:
                self._finish(seq)
        return outputs

    # ------------------------------------------------------------------ planning

    def _num_schedulable(self, seq: Sequence) -> int:
        """Input tokens that `seq` could run now."""
        num_tokens = len(seq.token_ids) + seq.num_in_flight
        if seq.num_in_flight and (seq.needs_host or num_tokens >= seq.max_num_tokens):
            return 0  # the token in flight is certainly the last, or must be seen first
        return num_tokens - seq.num_scheduled

    def _reach(self, seq: Sequence, start: int, count: int) -> int:
        """How many of `count` tokens from `start` on can run in this step for the images among them."""
        return count if self._images is None else self._images.reach(seq, start, count)

    def _plan_entry(self, seq: Sequence, count: int) -> PlanEntry:
        """Spend `count` tokens on `seq`, whose pages suffice."""
        start = seq.num_scheduled
        token_ids = tuple(seq.token_ids[start : start + count])
        if len(token_ids) < count:
            token_ids += (ON_DEVICE,)
            assert len(token_ids) == count, "only the newest token can be unknown to the host"
        samples = start + count == len(seq.token_ids) + seq.num_in_flight
        targets: tuple[int, ...] = ()
        if _scores_next(seq):
            targets = tuple(seq.token_ids[start + 1 : min(start + count + 1, seq.num_prompt_tokens)])
        num_planned = seq.num_planned_pages
        entry = PlanEntry(
            seq_id=seq.seq_id,
            slot=seq.slot,
            start=start,
            token_ids=token_ids,
            samples=samples,
            num_generated=seq.num_generated,
            page_offset=num_planned,
            new_pages=tuple(seq.pages[num_planned:]) if len(seq.pages) > num_planned else (),
            tail_ids=seq.tail_ids() if seq.needs_host else (),
            prompt_targets=targets,
        )
        if seq.images is not None and self._images is not None:
            entry.images = self._images.spans(seq, start, count)
            entry.rope_delta = seq.images.rope_delta(start)
        seq.num_planned_pages = len(seq.pages)
        seq.num_scheduled += count
        if count > 1:
            # One that runs alone may be in a decode step, whose rows do not see what others write in it.
            self._register_pages(seq)
        if samples:
            seq.num_in_flight += 1
        return entry

    def _extend_to_burst(self, entries: list[PlanEntry]) -> int:
        """Let entries, all of them decoding, sample up to `burst_steps` tokens each; how many the longest takes.

        As far as their lengths and pages allow: nobody is preempted for it, and nobody is planned for whose next token
        the host must see the last one, or count it; nor do such sequences wait for others' bursts.
        """
        seqs = [self._by_seq_id[entry.seq_id] for entry in entries]
        if any(seq.needs_host for seq in self._running) or any(
            len(entry.token_ids) > 1
            or not entry.samples
            or seq.constraint is not None
            or entry.num_generated < seq.request.params.min_tokens
            for entry, seq in zip(entries, seqs, strict=True)
        ):
            return 1
        longest = 1
        for entry, seq in zip(entries, seqs, strict=True):
            # One token of the entry's is scheduled and in flight already.
            more = min(self.burst_steps - 1, seq.max_num_tokens - len(seq.token_ids) - seq.num_in_flight)
            missing = -(-(seq.num_scheduled + more) // self._page_size) - len(seq.pages)
            if missing > 0:
                pages = self.allocator.allocate(missing)
                if pages is None:
                    more = len(seq.pages) * self._page_size - seq.num_scheduled
                else:
                    seq.pages += pages
                    entry.new_pages += tuple(pages)
                    seq.num_planned_pages = len(seq.pages)
            if more > 0:
                entry.num_steps += more
                seq.num_scheduled += more
                seq.num_in_flight += more
                longest = max(longest, entry.num_steps)
        return longest

    def _grow(self, seq: Sequence, count: int, planned: Collection[int]) -> bool:
        """Get pages for `count` more tokens, preempting sequences that come after `seq` and are not planned yet.

        False if that is not enough: `seq` keeps what it has and waits for those before it, which go on.  The first
        sequence always finds victims or room, so there is always progress.
        """
        needed = -(-(seq.num_scheduled + count) // self._page_size) - len(seq.pages)
        if needed <= 0:
            return True
        while (pages := self.allocator.allocate(needed)) is None:
            victim = next(
                (s for s in reversed(self._running) if s.order > seq.order and s.seq_id not in planned), None
            )
            if victim is None:
                return False
            self._preempt(victim)
        seq.pages += pages
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take slot and pages; the sequence starts over (from the prefix cache, with luck) when there is room."""
        self.counters.num_preemptions += 1
        self._running.remove(seq)
        self._give_back(seq)
        heapq.heappush(self._waiting, (seq.order, seq))

    def _give_back(self, seq: Sequence) -> None:
        if self._images is not None:
            self._images.forget(seq)
        self.allocator.release(seq.pages)
        self._free_slots.append(seq.slot)
        seq.pages = []
        seq.slot = -1
        seq.num_scheduled = 0
        seq.num_registered_pages = 0
        seq.num_planned_pages = 0

    def _pop_waiting(self) -> Sequence | None:
        """The first waiting sequence, if it may start now; ended ones are dropped on the way."""
        while self._waiting:
            _, seq = heapq.heappop(self._waiting)
            if seq.seq_id not in self._by_seq_id:
                self._num_dropped -= 1
                continue
            if seq.num_in_flight:  # preempted a moment ago: its last token is still on the way
                heapq.heappush(self._waiting, (seq.order, seq))
                return None
            return seq
        return None

    def _sweep_waiting(self) -> None:
        """Rebuild the heap once half of it has ended: they hold prompts, and a stalled queue pops none.

        A rebuild costs what the aborts since the last one have paid for, so an abort is O(1) on average.
        """
        if self._num_dropped <= max(_MIN_DROPPED, len(self._waiting) // 2):
            return
        self._waiting = [entry for entry in self._waiting if entry[1].seq_id in self._by_seq_id]
        heapq.heapify(self._waiting)
        self._num_dropped = 0

    def _admit(self, seq: Sequence, budget: int) -> int | None:
        """Give `seq` a slot, what the prefix cache knows of it, and pages for its first chunk; the chunk's tokens.

        None if there are too few pages, 0 if its image has to wait for the tower.
        """
        seq.begin()
        num_tokens = len(seq.token_ids)
        cached: list[int] = []
        if not seq.wants_prompt_logprobs:  # those need every position to run
            cached = self.allocator.match_prefix(seq.page_hashes(self._page_size))
            cached = cached[: (num_tokens - 1) // self._page_size]  # the last token must run, to give logits
        num_cached = len(cached) * self._page_size
        count = self._reach(seq, num_cached, min(num_tokens - num_cached, budget))
        if not count:
            return 0
        self.allocator.acquire(cached)
        fresh = self.allocator.allocate(-(-(num_cached + count) // self._page_size) - len(cached))
        if fresh is None:
            self.allocator.release(cached)
            return None
        if not seq.wants_prompt_logprobs:
            self.counters.prefix_cache_queries += num_tokens
            self.counters.prefix_cache_hits += num_cached
        if seq.num_cached_tokens is None:
            # Of the prompt: a grammar may have begun the answer.
            seq.num_cached_tokens = min(num_cached, seq.num_prompt_tokens)
            seq.scheduled_time = time.monotonic()
        seq.pages = cached + fresh
        seq.num_registered_pages = len(cached)
        seq.num_scheduled = num_cached
        seq.slot = self._free_slots.pop()
        insort(self._running, seq, key=lambda s: s.order)
        return count

    # ------------------------------------------------------------------ committing

    def _register_pages(self, seq: Sequence) -> None:
        """Name the pages whose tokens are all known and whose keys and values are written or being written."""
        full = min(seq.num_scheduled, len(seq.token_ids)) // self._page_size
        if full <= seq.num_registered_pages:
            return
        for index in range(seq.num_registered_pages, full):
            self.allocator.register(seq.pages[index], seq.page_hash(index, self._page_size))
        seq.num_registered_pages = full

    def _finish_reason(self, seq: Sequence, token_id: int) -> tuple[str | None, int | None]:
        request = seq.request
        if len(seq.token_ids) - seq.num_prompt_tokens > request.params.min_tokens:
            if token_id in request.eos_token_ids:
                return FINISH_STOP, None
            if token_id in request.stop_token_ids:
                return FINISH_STOP, token_id
        if len(seq.token_ids) >= seq.max_num_tokens:
            return FINISH_LENGTH, None
        return None, None

    def _finish(self, seq: Sequence) -> None:
        is_waiting = seq.slot < 0
        if not is_waiting:
            self._running.remove(seq)
            self._give_back(seq)
        del self._by_id[seq.request.request_id]
        del self._by_seq_id[seq.seq_id]
        self._num_constrained -= seq.constraint is not None
        if is_waiting:  # aborted, or its last token came after it was preempted
            self._num_dropped += 1
            self._sweep_waiting()


def _scores_next(seq: Sequence) -> bool:
    """Whether the next chunk of `seq` has prompt log-probabilities to give."""
    return seq.num_scheduled < seq.num_prompt_tokens - 1 and seq.wants_prompt_logprobs
