"""Reasoning told from the answer: what holds for every format, and what each says about where answers begin."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.server.parsing.answer_format import make_answer_format
from jaxserve.server.reasoning_parsers.reasoning_format import ReasoningFormat
from jaxserve.server.reasoning_parsers.registry import REASONING_FORMATS, find_reasoning_parser
from tests.server.tool_parsers import replaying
from tests.server.tool_parsers.replaying import answer, pieces, read, whole

PAIRS = {name: e for name, e in REASONING_FORMATS.items() if isinstance(e, ReasoningFormat)}
TOLD_APART = sorted({e.names[0] for e in PAIRS.values() if not e.is_content})
FEW = settings(max_examples=15)
words = st.text(st.sampled_from("ab .\n<>é🎉"), max_size=20)


def _said(parser_name: str, text: str, prompt: str = "") -> tuple[str, str]:
    said = whole(make_answer_format(None, parser_name).parser(prompt=prompt), text)
    return said.reasoning, said.content


@pytest.mark.parametrize("name", TOLD_APART)
@FEW
@given(thought=words, said=words, is_open=st.booleans(), cuts=replaying.cuts)
def test_reasoning_and_answer_come_out_as_they_are(name, thought, said, is_open, cuts):
    declared = PAIRS[name]
    start, end = declared.starts[0], declared.ends[0]
    around = declared.answer_marks or ("", "")
    text = ("" if is_open else start) + thought + end + around[0] + said + around[1]
    parser = make_answer_format(None, name).parser(prompt="Hi" + start if is_open else "Hi")
    out = answer(read(parser, pieces(text, cuts)))
    assert out.reasoning == ("" if thought.isspace() else thought)
    if not said.isspace():  # white space alone may be dropped
        assert out.content == said


@pytest.mark.parametrize("name", sorted(PAIRS))
@FEW
@given(data=st.data(), cuts=replaying.cuts, prompt=st.sampled_from(["", "{start}\n", "{start}{end}"]))
def test_pieces_do_not_matter(name, data, cuts, prompt):
    declared = PAIRS[name]
    prompt = prompt.format(start=declared.starts[0], end=declared.ends[0])
    parts = st.one_of(st.sampled_from(sorted(declared.markers)), words, st.just("</thi"), st.just("\n"))
    text = "".join(data.draw(st.lists(parts, max_size=6)))
    first = read(make_answer_format(None, name).parser(prompt=prompt), [text])
    assert first == read(make_answer_format(None, name).parser(prompt=prompt), pieces(text, cuts))
    said = answer(first)
    assert len(said.content) + len(said.reasoning) <= len(text) + len("<think>")
    without_marks = text
    for mark in sorted(declared.markers, key=len, reverse=True):
        without_marks = without_marks.replace(mark, "")
    assert len(said.content) + len(said.reasoning) >= len(without_marks.replace("\n", "").replace(" ", ""))


def test_where_an_answer_begins():
    # The prompt tells, wherever it does.
    for name in TOLD_APART:
        declared = PAIRS[name]
        start, end = declared.starts[0], declared.ends[0]
        assert _said(name, f"t{end}a", f"…{start}\n") == ("t", "a")
        assert _said(name, "t", f"…{start}\n") == ("t", "")
        assert _said(name, "a", f"…{start}\n\n{end}\n\n") == ("", "a")
    # Where it does not:
    assert _said("deepseek_r1", "t</think>a") == ("t", "a")
    assert _said("deepseek_r1", "<think>t</think>a") == ("t", "a")
    assert _said("deepseek_r1", "cut off") == ("cut off", "")
    assert _said("qwen3", "\n<think>\nt\n</think>\n\na") == ("\nt\n", "\n\na")
    assert _said("qwen3", "<think>\n\n</think>\n\na") == ("", "\n\na")
    assert _said("qwen3", "no thought, and <think> is a tag") == ("", "no thought, and <think> is a tag")
    assert _said("qwen3", " \n") == ("", " \n")
    assert _said("qwen3", "<thi") == ("", "<thi")


def test_marks_around_the_answer_are_taken_off():
    assert _said("hunyuan_a13b", "<think>\nt\n</think>\n<answer>\na\n</answer>") == ("t", "a")
    assert _said("hunyuan_a13b", "<think>\nt\n</think>\n<answer>\na <answer>\n</ans") == (
        "t",
        "a <answer>\n</ans",
    )
    assert _said("ernie45", "t\n</think>\n\n<response>\na\n</response>\n") == ("t\n", "\na\n")
    assert _said("ernie45", "t\n</think>\na") == ("t\n", "\na")


def test_granite_says_it_in_words():
    text = "Here is my thought process: t Here's my response: a Here is my response: b"
    assert _said("granite", text) == (" t ", " a Here is my response: b")
    assert _said("granite", "Here is my answer.") == ("", "Here is my answer.")


def test_reasoning_can_stay_in_the_content():
    assert _said("minimax_m2_append_think", "t</think>a") == ("", "<think>t</think>a")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"reasoning_parser='qwen9'.*deepseek_r1.*qwen3"):
        find_reasoning_parser("qwen9")
