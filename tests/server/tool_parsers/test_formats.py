"""What holds for every format: nothing is lost, nothing invented, and pieces do not matter."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.server.parsing.stages import WithoutBlanks
from jaxserve.server.tool_parsers.registry import TOOL_FORMATS, find_tool_parser
from jaxserve.server.tool_parsers.tool_format import ToolFormat
from jaxserve.server.toolcheck.writers import WRITERS
from tests.server.tool_parsers import replaying
from tests.server.tool_parsers.replaying import answer, pieces, read, whole

DECLARED = {name: entry for name, entry in TOOL_FORMATS.items() if isinstance(entry, ToolFormat)}
ONE_EACH = sorted({entry.names[0] for entry in DECLARED.values()})
FEW = settings(max_examples=15)
# Formats whose arguments are no JSON text: values may differ by what the format cannot say.
COERCED = {"functiongemma", "qwen3_coder", "seed_oss", "glm45", "minimax_m2", "step3", "minicpm5"}


def test_every_format_has_a_writer():
    assert sorted(WRITERS) == ONE_EACH


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"tool_call_parser='hermse'.*hermes"):
        find_tool_parser("hermse")


@pytest.mark.parametrize("name", ONE_EACH)
@FEW
@given(calls=replaying.calls, before=replaying.prose, after=replaying.prose, cuts=replaying.cuts)
def test_calls_and_the_text_around_them_are_read(name, calls, before, after, cuts):
    entry = DECLARED[name]
    if entry.begins_at_start:
        before = ""
    # At the end of an answer this would be a mark that was cut off.
    assume(not after.strip() or not any(mark.startswith(after.lstrip()) for mark in entry.markers))
    # A mark within a value is a mark, where the format has no way to write it as anything else.
    assume(name not in COERCED or re.search(r"<[/|\w]", json.dumps(calls, ensure_ascii=False)) is None)
    text = before + WRITERS[name](calls) + after
    said = answer(read(WithoutBlanks(entry.parser(())), pieces(text, cuts)))
    assert [call.name for call in said.calls] == [call_name for call_name, _ in calls]
    if name not in COERCED:
        assert [call.value for call in said.calls] == [arguments for _, arguments in calls]
    told = [part for part in (before, after) if not part.isspace()]
    assert said.content == "".join(told)


@pytest.mark.parametrize("name", ONE_EACH)
@FEW
@given(data=st.data(), cuts=replaying.cuts, constrained=st.booleans())
def test_pieces_do_not_matter(name, data, cuts, constrained):
    entry = DECLARED[name]
    call = st.builds(lambda calls: WRITERS[name](calls), replaying.calls)
    broken = st.builds(lambda text, n: text[: n % (len(text) + 1)], call, st.integers(0, 300))
    soup = st.lists(
        st.one_of(st.sampled_from(sorted(entry.markers)), broken, broken, call, replaying.json_text)
    )
    text = "".join(data.draw(soup))
    events = read(entry.parser((), constrained=constrained), [text])
    assert events == read(entry.parser((), constrained=constrained), pieces(text, cuts))
    said = answer(events)
    if not said.calls:
        assert said.content == text
    assert len(said.content) <= len(text)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_cut_answer_invents_no_call(name):
    calls = [
        ("get_weather", {"city": "Paris", "days": [1, 2.5], "deep": {"a": None, "b": 'q"}]'}}),
        ("f", {}),
        ("g", {"x": "y"}),
    ]
    text = WRITERS[name](calls)
    entry = DECLARED[name]
    complete = whole(entry.parser(()), text).calls
    assert [call.name for call in complete] == ["get_weather", "f", "g"]
    for end in range(len(text)):
        said = whole(entry.parser(()), text[:end])
        assert said.calls == complete[: len(said.calls)]
        if not said.calls:
            assert said.content == text[:end]
        eager = whole(entry.parser((), constrained=True), text[:end])
        for call, real in zip(eager.calls, complete, strict=False):
            assert call.name == real.name
            assert real.arguments.startswith(call.arguments)
        assert len(eager.calls) <= len(complete)


@pytest.mark.parametrize("name", ONE_EACH)
def test_long_arguments_are_streamed(name):
    text = WRITERS[name]([("write_file", {"text": "line\n" * 1000})])
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "write_file", "parameters": parameters}}
    parser = DECLARED[name].parser([tool])
    half = answer(parser.push(text[: len(text) // 2], ()))
    assert half.calls[0].name == "write_file"
    assert len(half.calls[0].arguments) > len(text) // 3
