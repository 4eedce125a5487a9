"""A device made of dictionaries: runs step plans as the runner does, with token ids in place of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.engine.plan import ON_DEVICE, StepPlan, StepResult
from jaxserve.engine.protocol import TokenLogprobs

VOCAB_SIZE = 50


def next_token(context: Sequence[int]) -> int:
    """The simulated model: what follows depends on every token and its position."""
    state = 7
    for token in context:
        state = (state * 31 + token + 1) % 1_000_003
    return state % VOCAB_SIZE


def generate_alone(
    prompt: Sequence[int], max_tokens: int, eos: Sequence[int], stop: Sequence[int], max_len: int
) -> list[int]:
    """What a request must give, whatever else is in the batch."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        done = len(tokens) - len(prompt) >= max_tokens or len(tokens) >= max_len
        if tokens[-1] in eos or tokens[-1] in stop or done:
            return tokens[len(prompt) :]


class SimulatedDevice:
    """Pages hold (token, position) pairs; a sampled token is a function of what the pages say."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: dict[tuple[int, int], int] = {}
        self._rows: dict[int, list[int]] = {}
        self._last_token: dict[int, int] = {}

    def run(self, plan: StepPlan) -> StepResult:
        """All writes of the step first, then all reads, as every layer does.

        Where all entries have one token, one kernel may do both (gpu_decode.py): an entry then sees its own token, and
        of the others what their pages held before.
        """
        assert plan.num_tokens > 0
        assert len({entry.slot for entry in plan.entries}) == len(plan.entries)
        assert max(entry.num_steps for entry in plan.entries) == plan.num_steps
        if plan.num_steps > 1:
            assert all(entry.samples and len(entry.token_ids) == 1 for entry in plan.entries)
        is_mixed = any(len(entry.token_ids) > 1 for entry in plan.entries)
        readable = self._pages if is_mixed else dict(self._pages)
        own: list[list[int]] = []
        for entry in plan.entries:
            row = self._rows.setdefault(entry.slot, [])
            row[entry.page_offset :] = entry.new_pages
            own.append([self._last_token[entry.slot] if t == ON_DEVICE else t for t in entry.token_ids])
            for index, token in enumerate(own[-1]):
                page, offset = divmod(entry.start + index, self._page_size)
                self._pages[row[page], offset] = token
        sampled, scores = [], []
        for entry, new in zip(plan.entries, own, strict=True):
            row = self._rows[entry.slot]
            length = entry.start + len(entry.token_ids)
            places = [(row[p // self._page_size], p % self._page_size) for p in range(entry.start)]
            context = [readable.get(place, -1) for place in places] + new
            tokens = []
            for _ in range(entry.num_steps):
                tokens.append(next_token(context))
                context.append(tokens[-1])
            if entry.samples:
                self._last_token[entry.slot] = tokens[-1]
                for index, token in enumerate(tokens[:-1]):  # each is the input of the step after it
                    page, offset = divmod(length + index, self._page_size)
                    self._pages[row[page], offset] = token
            sampled.append(tokens if entry.samples else [-7])
            scores.append(
                [
                    TokenLogprobs(
                        token_id=target, logprob=float(entry.start + i), rank=1, top_ids=[], top_logprobs=[]
                    )
                    for i, target in enumerate(entry.prompt_targets)
                ]
            )
        return StepResult(token_ids=sampled, logprobs=[None] * len(sampled), prompt_logprobs=scores)
