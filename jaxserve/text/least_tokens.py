"""How few tokens a text can have: known long before a text far too long is tokenized."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterable


class LeastTokens:
    """Counts the fewest pieces of tokens (any run of bytes within one) that a text can be cut into.

    Tokens are such pieces, so however a tokenizer cuts the text, it has at least as many tokens.  Taking the longest
    piece every time gives the fewest, since whatever is part of a piece is one, too.
    """

    def __init__(self, tokens: Collection[bytes]) -> None:
        """`tokens` are the bytes of the whole vocabulary.  Takes some tenths of a second."""
        self._longest = max(map(len, tokens), default=1)
        # A piece is the beginning of a token's end.  Ends are sorted, so that those which have most in common with a
        # text lie next to it, under their first two bytes: one large sort would hold the interpreter's lock for long.
        ends = {token[start:] for token in tokens for start in range(len(token) - 1)}
        self._ends: dict[bytes, list[bytes]] = {}
        for end in ends:
            self._ends.setdefault(end[:2], []).append(end)
        for group in self._ends.values():
            group.sort()

    def count(self, segments: Iterable[bytes], enough: int) -> int:
        """Tokens of a text at least, counted no further than `enough`.

        `segments` are stretches of the text, in order, which do not overlap; what lies between them may have become
        anything.  A token may reach from one into the next.
        """
        total = 0
        for segment in segments:
            if total >= enough:
                break
            if segment:
                reaches_in = total > 0
                total += self._pieces(segment, enough - total + reaches_in) - reaches_in
        return total

    def _pieces(self, data: bytes, enough: int) -> int:
        count = at = 0
        while at < len(data) and count < enough:
            at += self._reach(data, at)
            count += 1
        return count

    def _reach(self, data: bytes, at: int) -> int:
        """The length of the longest piece there; a single byte always is one."""
        group = self._ends.get(data[at : at + 2])
        if group is None:
            return 1
        rest = data[at : at + self._longest]
        place = bisect(group, rest)
        return max(_common(rest, end) for end in group[max(place - 1, 0) : place + 1])


def _common(one: bytes, other: bytes) -> int:
    """How many bytes two strings have in common at their beginnings."""
    length = min(len(one), len(other))
    differing = int.from_bytes(one[:length]) ^ int.from_bytes(other[:length])
    return length - (differing.bit_length() + 7) // 8
