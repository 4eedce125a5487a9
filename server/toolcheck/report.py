"""A divergence, told so that one sees where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxserve.server.toolcheck.replay import Divergence, Piece, Said

_LONGEST = 400  # characters of a text that are shown
_MOST_PIECES = 12


def report(name: str, divergence: Divergence) -> str:
    """Lines that say what was given, and what came out both ways."""
    lines = [
        f"{name}: streamed and not streamed differ",
        "",
        f"  {'beginning' if divergence.is_cut else 'answer':13}{_shown(divergence.text)}",
        f"  {'in pieces':13}{_shown_pieces(divergence.pieces)}",
        *_block("not streamed", divergence.not_streamed),
        *_block("streamed", divergence.streamed),
        f"  {'difference':13}{_difference(divergence.not_streamed, divergence.streamed)}",
    ]
    return "\n".join(lines)


def _block(title: str, said: Said) -> Iterator[str]:
    lines = []
    if said.error is not None:
        lines.append(f"raises: {said.error}")
    if said.reasoning:
        lines.append(f"reasoning {_shown(said.reasoning)}")
    if said.content:
        lines.append(f"content {_shown(said.content)}")
    lines += [f"call {name}({_shown(arguments)})" for name, arguments in said.calls]
    for number, line in enumerate(lines or ["nothing"]):
        yield f"  {'' if number else title:13}{line}"


def _difference(whole: Said, streamed: Said) -> str:
    """The first thing that is not the same."""
    if streamed.error != whole.error:
        return (
            "only one of them raises" if None in (streamed.error, whole.error) else "they raise differently"
        )
    if streamed.error is not None:
        return "both raise"
    for part in ("reasoning", "content"):
        a, b = getattr(whole, part), getattr(streamed, part)
        if a != b:
            return f"{part} {_where(a, b)}"
    for number, (a, b) in enumerate(zip(whole.calls, streamed.calls, strict=False)):
        if a[0] != b[0]:
            return f"call {number}: the name is {a[0]!r} not streamed and {b[0]!r} streamed"
        if a[1] != b[1]:
            return f"call {number}: the arguments {_where(a[1], b[1])}"
    return f"{len(whole.calls)} calls not streamed, {len(streamed.calls)} streamed"


def _where(a: str, b: str) -> str:
    place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"from character {place}: {_shown(a[place:], 60)} not streamed, {_shown(b[place:], 60)} streamed"


def _shown_pieces(pieces: Sequence[Piece]) -> str:
    if all(len(piece.token_ids) == 1 for piece in pieces):
        return f"{len(pieces)} pieces of one token"
    shown = " | ".join(_shown(piece.text, 60) for piece in pieces[:_MOST_PIECES])
    return shown + (f" | … {len(pieces)} in all" if len(pieces) > _MOST_PIECES else "")


def _shown(text: str, longest: int = _LONGEST) -> str:
    if len(text) <= longest:
        return repr(text)
    half = longest // 2
    return f"{text[:half]!r} … {text[-half:]!r}"
