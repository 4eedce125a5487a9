"""Server-sent events, however the bytes are cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.sse import SseParser


def feed(*chunks: bytes) -> list[bytes]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_one_event() -> None:
    assert feed(b'data: {"a": 1}\n\n') == [b'{"a": 1}']


def test_crlf_and_no_space_after_the_colon() -> None:
    assert feed(b"data:a\r\n\r\ndata: b\r\n\r\n") == [b"a", b"b"]


def test_comments_and_other_fields_are_passed_over() -> None:
    assert feed(b": ping\n\nevent: x\nid: 3\ndata: a\nretry: 5\n\n") == [b"a"]


def test_data_lines_of_one_event_are_joined() -> None:
    assert feed(b"data: a\ndata: b\n\n") == [b"a\nb"]


def test_an_event_that_has_not_ended_is_not_given() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]


@settings(max_examples=50)
@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\n\r", codec="utf-8"), min_size=1), max_size=5),
    cuts=st.lists(st.integers(1, 7), min_size=1),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
)
def test_cuts_do_not_matter(texts: list[str], cuts: list[int], line_end: bytes) -> None:
    stream = b"".join(b"data: " + text.encode() + line_end * 2 for text in texts)
    chunks, position, turn = [], 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        chunks.append(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert feed(*chunks) == [text.encode() for text in texts]
