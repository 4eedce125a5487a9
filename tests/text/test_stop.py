"""Stop strings against brute force."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.stop import StopChecker


def run(checker: StopChecker, chunks: list[str]) -> tuple[list[str], str | None]:
    """The texts given out (with what flush gives) and the stop string."""
    given_out: list[str] = []
    for chunk in chunks:
        text, stop = checker.push(chunk)
        given_out.append(text)
        if stop is not None:
            assert checker.flush() == ""
            return given_out, stop
    return [*given_out, checker.flush()], None


def by_force(tokens: list[str], stop: list[str], include: bool, min_tokens: int) -> tuple[str, str | None]:
    """Read character by character, and look at the whole text each time."""
    seen = ""
    for number, token in enumerate(tokens, 1):
        for character in token:
            seen += character
            complete = [s for s in stop if seen.endswith(s)]
            if complete and number > min_tokens:
                longest = max(complete, key=len)
                return (seen if include else seen[: -len(longest)]), longest
    return seen, None


few = st.text(alphabet="ab", min_size=1, max_size=5)
token_lists = st.lists(st.text(alphabet="ab", max_size=4), max_size=12)


@given(
    tokens=token_lists, stop=st.lists(few, max_size=4), include=st.booleans(), min_tokens=st.integers(0, 6)
)
def test_same_as_brute_force(tokens: list[str], stop: list[str], include: bool, min_tokens: int) -> None:
    texts, matched = run(StopChecker(stop, include, min_tokens), tokens)
    assert ("".join(texts), matched) == by_force(tokens, stop, include, min_tokens)


@given(
    text=st.text(alphabet="ab", max_size=30),
    cuts=st.lists(st.integers(0, 30)),
    stop=st.lists(few, max_size=4),
)
def test_chunks_make_no_difference(text: str, cuts: list[int], stop: list[str]) -> None:
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    chunks = [text[a:b] for a, b in itertools.pairwise(bounds)]
    for include in (False, True):
        texts, matched = run(StopChecker(stop, include), chunks)
        assert ("".join(texts), matched) == by_force([text], stop, include, 0)


@given(text=st.text(alphabet="ab", max_size=20), stop=st.lists(few, min_size=1, max_size=3))
def test_exactly_what_may_begin_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    checker, out, seen = StopChecker(stop), "", ""
    for character in text:
        seen += character
        emitted, matched = checker.push(character)
        out += emitted
        if matched:
            return
        longest = max(n for s in stop for n in range(len(s)) if n <= len(seen) and seen.endswith(s[:n]))
        assert out == seen[: len(seen) - longest]


def test_the_stop_string_is_cut_off_or_kept() -> None:
    assert run(StopChecker(("</s>",)), ["Hi <", "/s", "> more"]) == (["Hi ", "", ""], "</s>")
    assert run(StopChecker(("</s>",), True), ["Hi <", "/s", "> more"]) == (["Hi <", "/s", ">"], "</s>")


def test_what_only_looked_like_a_stop_string_is_given_out() -> None:
    assert run(StopChecker(("STOP",)), ["a ST", "UB S", "T"]) == (["a ", "STUB ", "", "ST"], None)


def test_of_two_complete_at_once_the_longer_counts() -> None:
    assert run(StopChecker(("b", "ab")), ["xab"]) == (["x"], "ab")
    assert run(StopChecker(("abcd", "bc")), ["xabcd"]) == (["xa"], "bc")


def test_min_tokens_forgives_what_is_complete_within_them() -> None:
    assert run(StopChecker(("END",), min_tokens=2), ["END", "", "EN", "D!"]) == (["END", "", "", ""], "END")
    assert run(StopChecker(("END",), min_tokens=2), ["a", "E", "ND"]) == (["a", "", ""], "END")
    assert run(StopChecker(("END",), min_tokens=3), ["a", "E", "ND"]) == (["a", "", "END", ""], None)


def test_no_stop_strings_no_delay() -> None:
    assert run(StopChecker(()), ["a", "b"]) == (["a", "b", ""], None)


def test_long_stop_strings_cost_no_more_than_their_length() -> None:
    stop = "a" * 100_000 + "b"
    checker = StopChecker((stop,))
    assert run(checker, ["a" * 1000] * 150 + ["b"])[1] == stop


@pytest.mark.parametrize("include", [False, True])
def test_nothing_may_follow_a_stop(include: bool) -> None:
    checker = StopChecker(("x",), include)
    checker.push("x")
    with pytest.raises(AssertionError, match="already stopped"):
        checker.push("y")


@given(
    text=st.text(alphabet="abc", max_size=40),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=7), max_size=30),
    include=st.booleans(),
    min_tokens=st.integers(0, 30),
)
def test_many_stop_strings(text: str, stop: list[str], include: bool, min_tokens: int) -> None:
    texts, matched = run(StopChecker(stop, include, min_tokens), list(text))
    assert ("".join(texts), matched) == by_force(list(text), stop, include, min_tokens)


@given(text=st.text(alphabet="ab", max_size=30), stop=st.lists(few, max_size=6))
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text: str, stop: list[str]) -> None:
    checker, seen, given_out = StopChecker(stop), "", ""
    for character in text:
        piece, matched = checker.push(character)
        seen, given_out = seen + character, given_out + piece
        if matched is not None:
            return
        beginnings = [s[:n] for s in stop for n in range(1, len(s)) if seen.endswith(s[:n])]
        assert len(given_out) == len(seen) - max(map(len, beginnings), default=0)
