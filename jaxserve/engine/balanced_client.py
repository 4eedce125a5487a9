"""Several engines alike behind one EngineClient: each request goes where it will be answered soonest."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from jaxserve.engine.image_positions import ImagePositions
from jaxserve.engine.pages import PageHash, hash_page, root_hash
from jaxserve.engine.protocol import CoreRequest, EngineClient, EngineStats, OnDead, OnOutputs, TokenOutput
from jaxserve.errors import EngineDeadError

# So many prompt tokens that must be computed hold an engine up as much as one more sequence.
_TOKENS_PER_SEQUENCE = 512
_MOST_PAGES = 1024  # of a prompt that are looked up: by then it is clear where it belongs


@dataclass(slots=True)
class _Flight:
    """A request that an engine works on."""

    replica: _Replica
    num_uncomputed: int  # prompt tokens that the engine is believed not to have; 0 once an answer has begun


@dataclass(slots=True)
class _Replica:
    """An engine, and what is believed of it."""

    index: int
    client: EngineClient
    num_unfinished: int = 0
    num_uncomputed: int = 0  # prompt tokens of its requests that have given nothing yet
    # Names of the prompt pages that were sent to it, the one used longest ago first; no more than it has pages.
    prefixes: OrderedDict[PageHash, None] = field(default_factory=OrderedDict)

    def num_known(self, hashes: Sequence[PageHash]) -> int:
        """How many leading pages of a prompt it should still have."""
        return next((i for i, name in enumerate(hashes) if name not in self.prefixes), len(hashes))

    def remember(self, hashes: Sequence[PageHash]) -> None:
        """Its cache has these pages from now on, and lets go of others for them, a prefix's tail before its head."""
        for name in reversed(hashes):
            self.prefixes[name] = None
            self.prefixes.move_to_end(name)
        while len(self.prefixes) > self.client.info.num_pages:
            self.prefixes.popitem(last=False)


@dataclass(slots=True)
class _Prompt:
    """What siblings have in common, found out once: there may be thousands."""

    num_tokens: int
    hashes: list[PageHash]  # names of its leading full pages
    num_known: list[int]  # of these, how many each replica should have
    replicas: set[int] = field(default_factory=set)  # that have been given one of the siblings


class BalancedClient:
    """EngineClient over replicas of one engine, which share nothing but the process.

    A request goes to the replica that has the least to do once it has the request as well: sequences, and prompt
    tokens that must be computed.  What a replica was sent lately counts as computed there, so requests whose prompts
    begin alike (those of one conversation, the n answers of one request) meet in one prefix cache, until that replica
    is so much busier than another that computing the prefix again is the lesser evil.

    One dead replica is the end of all: its device, and whoever waits for it, need a new process anyway.
    """

    def __init__(self, replicas: Sequence[EngineClient], *, enable_prefix_caching: bool = True) -> None:
        """`replicas` are engines built alike, none of them started."""
        self._replicas = [_Replica(index, client) for index, client in enumerate(replicas)]
        self._enable_prefix_caching = enable_prefix_caching
        info = replicas[0].info
        self.info = replace(
            info,
            max_num_seqs=sum(client.info.max_num_seqs for client in replicas),
            num_pages=sum(client.info.num_pages for client in replicas),
            device=f"{len(replicas)} engines of {info.device}",
        )
        self._page_size = info.page_size
        self._flights: dict[str, _Flight] = {}
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._error: EngineDeadError | None = None
        self._is_stopped = False

    def start(self, on_outputs: OnOutputs, on_dead: OnDead) -> None:
        """Start every replica.  `on_outputs` is called from their threads, one at a time for each."""

        def deliver(outputs: Sequence[TokenOutput]) -> None:
            self._note(outputs)
            on_outputs(outputs)

        for replica in self._replicas:
            replica.client.start(deliver, functools.partial(self._bury, replica, on_dead))

    def submit(self, requests: Sequence[CoreRequest]) -> None:
        """Give each request to the replica that suits it best; EngineDeadError once one of them has died."""
        families = self._families(requests)  # before the lock, for which whoever has an answer waits
        batches: dict[int, list[CoreRequest]] = {}
        with self._lock:
            if self._error is not None or self._is_stopped:
                raise self._error or EngineDeadError("the engine is not running: it was shut down")
            for siblings, hashes in families:
                known = [replica.num_known(hashes) for replica in self._replicas]
                prompt = _Prompt(len(siblings[0].prompt_token_ids), hashes, known)
                for request in siblings:
                    replica = self._choose(request.request_id, prompt)
                    batches.setdefault(replica.index, []).append(request)
            # Whoever aborts one of them from now on does so behind this.
            for index, batch in batches.items():
                self._replicas[index].client.submit(batch)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests, wherever they are."""
        batches: dict[int, list[str]] = {}
        with self._lock:
            for request_id in request_ids:
                if (replica := self._land(request_id)) is not None:
                    batches.setdefault(replica.index, []).append(request_id)
        for index, batch in batches.items():
            self._replicas[index].client.abort(batch)

    def stats(self) -> EngineStats:
        """The sums over all replicas."""
        snapshots = [replica.client.stats() for replica in self._replicas]
        return EngineStats(
            **{one.name: sum(getattr(stats, one.name) for stats in snapshots) for one in fields(EngineStats)}
        )

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False while any page of any replica is in use."""
        done = [replica.client.reset_prefix_cache() for replica in self._replicas]
        with self._lock:
            for replica, is_reset in zip(self._replicas, done, strict=True):
                if is_reset:
                    replica.prefixes.clear()
        return all(done)

    def shutdown(self) -> None:
        """Stop all replicas; what was in flight is dropped."""
        with self._lock:
            self._is_stopped = True
        for replica in self._replicas:
            replica.client.shutdown()

    def _families(self, requests: Sequence[CoreRequest]) -> list[tuple[list[CoreRequest], list[PageHash]]]:
        """Siblings, of whom those of one request stand together, and the names of their prompt's pages.

        A microsecond or more a page: up to a second for thousands of prompts.
        """
        families: list[tuple[list[CoreRequest], list[PageHash]]] = []
        for request in requests:
            if families and _is_sibling(request, families[-1][0][0]):
                families[-1][0].append(request)
            else:
                families.append(([request], self._page_names(request)))
        return families

    def _page_names(self, request: CoreRequest) -> list[PageHash]:
        """The prompt's leading full pages, by the names that prefix caches give them."""
        if not self._enable_prefix_caching:
            return []
        names: list[PageHash] = []
        parent, tokens, size = root_hash(request.cache_salt), request.prompt_token_ids, self._page_size
        images = ImagePositions(request.images) if request.images else None
        for start in range(0, min(len(tokens) - size + 1, _MOST_PAGES * size), size):
            if images is not None:
                parent = images.mixed_into(parent, start, start + size)
            parent = hash_page(parent, tokens[start : start + size])
            names.append(parent)
        return names

    def _choose(self, request_id: str, prompt: _Prompt) -> _Replica:
        """The replica for a request, which it has from now on."""
        first = next(self._turns)  # of those equally good each has its turn

        def num_missing(replica: _Replica) -> int:
            """Prompt tokens that it would have to compute."""
            return prompt.num_tokens - self._page_size * prompt.num_known[replica.index]

        def rank(replica: _Replica) -> tuple[float, int]:
            # What is missing counts twice: the request waits for it, and it is work that another may have done.
            tokens = replica.num_uncomputed + 2 * num_missing(replica)
            cost = replica.num_unfinished + tokens / _TOKENS_PER_SEQUENCE
            return cost, (replica.index - first) % len(self._replicas)

        replica = min(self._replicas, key=rank)
        flight = _Flight(replica, num_missing(replica))
        self._flights[request_id] = flight
        replica.num_unfinished += 1
        replica.num_uncomputed += flight.num_uncomputed
        if replica.index not in prompt.replicas:
            prompt.replicas.add(replica.index)
            replica.remember(prompt.hashes)
            prompt.num_known[replica.index] = replica.num_known(prompt.hashes)
        return replica

    def _note(self, outputs: Sequence[TokenOutput]) -> None:
        """Requests have begun to answer, or ended."""
        with self._lock:
            for output in outputs:
                if output.finish_reason is not None:
                    self._land(output.request_id)
                elif (flight := self._flights.get(output.request_id)) is not None and flight.num_uncomputed:
                    flight.replica.num_uncomputed -= flight.num_uncomputed
                    flight.num_uncomputed = 0

    def _land(self, request_id: str) -> _Replica | None:
        """Forget a request; the replica that had it, None if it has ended already."""
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return None
        flight.replica.num_unfinished -= 1
        flight.replica.num_uncomputed -= flight.num_uncomputed
        return flight.replica

    def _bury(self, replica: _Replica, on_dead: OnDead, error: Exception) -> None:
        """A replica has died: the others stop what they do, and the front end is told once."""
        with self._lock:
            if self._error is not None:
                return
            dead = EngineDeadError(f"replica {replica.index} of {len(self._replicas)} died: {error}")
            dead.__cause__ = error
            self._error = dead
            unfinished = list(self._flights)
        on_dead(dead)
        self.abort(unfinished)


def _is_sibling(request: CoreRequest, other: CoreRequest) -> bool:
    if request.prompt_token_ids is not other.prompt_token_ids or request.images is not other.images:
        return False
    return request.cache_salt == other.cache_salt
