"""Replays answers through a parser, cut in every way, until two replays of one answer differ."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from jaxserve.errors import JaxserveError
from jaxserve.server.parsing.events import CallArguments, CallStart, Content, Event, Reasoning
from jaxserve.server.toolcheck.subjects import Subject
from jaxserve.server.toolcheck.texts import Sample
from jaxserve.text.detokenizer import Detokenizer

NUM_RANDOM = 16  # random ways of cutting an answer
_LONG = 400  # tokens of an answer whose beginnings are not given one token at a time


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that come at once, and their text."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Said:
    """What a parser said of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name and arguments
    error: str | None = None  # that it raised

    def same(self, other: Said, *, exact: bool) -> bool:
        """Whether both say the same; unless `exact`, arguments that are the same JSON are the same."""
        if (self.reasoning, self.content, self.error) != (other.reasoning, other.content, other.error):
            return False
        if len(self.calls) != len(other.calls):
            return False
        return all(
            a == b or (not exact and a[0] == b[0] and _value(a[1]) == _value(b[1]))
            for a, b in zip(self.calls, other.calls, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two replays of one answer that differ."""

    text: str  # that both were given
    is_cut: bool  # it is the beginning of the sample
    pieces: Sequence[Piece]  # as it was streamed
    not_streamed: Said
    streamed: Said


@dataclass(slots=True)
class Findings:
    """How a check went."""

    num_replays: int = 0
    num_calls: int = 0  # in answers that were not streamed
    divergence: Divergence | None = None


def check(
    subject: Subject,
    samples: Sequence[Sample],
    seed: int,
    on_progress: Callable[[int], object] = lambda num_replays: None,
) -> Findings:
    """Replay every sample: whole, by tokens, cut in two at every token and at random, and each of its beginnings.

    Ends with the first divergence.  `on_progress` is told of replays as they are done; `num_replays` of a check that
    finds none is what `num_planned` says.
    """
    findings = Findings()
    for number, sample in enumerate(samples):
        tokens = tokens_of(subject, sample.text)
        for replays, divergence in _replays(
            subject, sample, tokens, random.Random(f"{seed} {number}"), findings
        ):
            findings.num_replays += replays
            on_progress(replays)
            if divergence is not None:
                findings.divergence = divergence
                return findings
    return findings


def num_planned(subject: Subject, samples: Iterable[Sample]) -> int:
    """How many replays a check makes."""
    lengths = [len(tokens_of(subject, sample.text)) for sample in samples]
    return sum(2 * max(length - 1, 0) + NUM_RANDOM + 2 for length in lengths)


def tokens_of(subject: Subject, text: str) -> list[Piece]:
    """The tokens of a text, each with the characters that it completes."""
    detokenizer = Detokenizer(subject.tokenizer, skip_special_tokens=False)
    ids = subject.tokenizer.encode(text, add_special_tokens=False)
    return [Piece(detokenizer.push([token_id]), (token_id,)) for token_id in ids]


def _replays(
    subject: Subject, sample: Sample, tokens: list[Piece], chance: random.Random, findings: Findings
) -> Iterator[tuple[int, Divergence | None]]:
    text = "".join(token.text for token in tokens)
    whole = _said(subject, sample, [_joined(tokens)], streamed=False)
    findings.num_calls += len(whole.calls)

    def compare(pieces: Sequence[Piece], said: Said, reference: Said = whole) -> Divergence | None:
        if said.error is None and said.same(reference, exact=subject.keeps_arguments):
            return None
        given = "".join(piece.text for piece in pieces)
        return Divergence(given, given != text, pieces, reference, said)

    def streamed(pieces: Sequence[Piece]) -> Divergence | None:
        return compare(pieces, _said(subject, sample, pieces, streamed=True))

    yield 2, streamed([_joined(tokens)]) or streamed(tokens)
    for split in range(1, len(tokens)):
        yield 1, streamed([_joined(tokens[:split]), _joined(tokens[split:])])
    for _ in range(NUM_RANDOM):
        yield 1, streamed(_cut(tokens, chance))
    beginnings = _beginnings(subject, sample, tokens, chance)
    for length, (pieces, said) in zip(range(1, len(tokens)), beginnings, strict=False):
        reference = _said(subject, sample, [_joined(tokens[:length])], streamed=False)
        yield 1, compare(pieces, said, reference)


def _beginnings(
    subject: Subject, sample: Sample, tokens: list[Piece], chance: random.Random
) -> Iterator[tuple[Sequence[Piece], Said]]:
    """Each beginning of an answer as it was streamed, and what the parser said of it."""
    if subject.streams_alike:
        for length in range(1, len(tokens)):
            start = tokens[:length]
            pieces = start if len(tokens) <= _LONG else _cut(start, chance)
            yield pieces, _said(subject, sample, pieces, streamed=True)
        return
    # A plug-in's stream has no end that it is told of: one stream has all its beginnings.
    events: list[Event] = []
    rest: list[Event] = []
    error = None
    parser = subject.parser(sample.tools, streamed=True)
    for length in range(1, len(tokens)):
        if error is None:
            try:
                events += parser.push(tokens[length - 1].text, tokens[length - 1].token_ids)
                rest = parser.finish()
            except JaxserveError as raised:
                error, rest = str(raised), []
        yield tokens[:length], _told([*events, *rest], error)


def _said(subject: Subject, sample: Sample, pieces: Sequence[Piece], *, streamed: bool) -> Said:
    events: list[Event] = []
    try:
        parser = subject.parser(sample.tools, streamed=streamed)
        for piece in pieces:
            events += parser.push(piece.text, piece.token_ids)
        events += parser.finish()
    except JaxserveError as error:
        return _told(events, str(error))
    return _told(events, None)


def _told(events: Iterable[Event], error: str | None) -> Said:
    said = Said(error=error)
    for event in events:
        match event:
            case Reasoning(text):
                said.reasoning += text
            case Content(text):
                said.content += text
            case CallStart(_, _, name):
                said.calls.append((name, ""))
            case CallArguments(index, text):
                name, arguments = said.calls[index]
                said.calls[index] = (name, arguments + text)
    return said


def _joined(tokens: Sequence[Piece]) -> Piece:
    ids = [token_id for token in tokens for token_id in token.token_ids]
    return Piece("".join(token.text for token in tokens), tuple(ids))


def _cut(tokens: Sequence[Piece], chance: random.Random) -> list[Piece]:
    """Cut at random, sometimes into many pieces and sometimes into few."""
    longest = chance.choice((2, 4, 16, 64))
    places = accumulate((chance.randint(1, longest) for _ in tokens), initial=0)
    cuts = [*(place for place in places if place < len(tokens)), len(tokens)]
    return [_joined(tokens[a:b]) for a, b in pairwise(cuts)]


def _value(text: str) -> object:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text
