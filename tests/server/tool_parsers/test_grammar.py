"""Grammars derived from formats: what they allow is read as the calls that were meant; what models write is allowed."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from jaxserve.errors import RequestError
from jaxserve.server.parsing.answer_format import make_answer_format
from jaxserve.server.toolcheck.writers import WRITERS
from jaxserve.structured.vocabulary import build_vocabulary
from tests.server.tool_parsers.replaying import whole
from tests.server.tool_parsers.test_formats import DECLARED, ONE_EACH
from tests.tiny import EOS, byte_tokenizer

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "unit"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CALLS = [("get_weather", {"city": "Paris", "unit": "celsius", "days": 3, "exact": True}), ("now", {})]
BYTES = LLTokenizer("byte")
NO_SPECIALS = byte_tokenizer(added=())


def matcher(name: str, choice: Any, *, parallel: bool = True, strict: bool = False) -> LLMatcher:
    """The grammar of a format, ready to take bytes."""
    tools = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in TOOLS]
    grammar = make_answer_format(name, None).grammar(tools, choice, parallel, NO_SPECIALS)
    assert grammar is not None
    made = LLMatcher(BYTES, grammar, log_level=0)
    assert made.get_error() == "", grammar
    return made


def allows(made: LLMatcher, text: str) -> bool:
    """Whether `text` is a whole answer under the grammar."""
    return made.deep_copy().try_consume_tokens(list(text.encode())) == len(text.encode()) and (
        _after(made, text).is_accepting()
    )


def _after(made: LLMatcher, text: str) -> LLMatcher:
    copy = made.deep_copy()
    copy.consume_tokens(list(text.encode()))
    return copy


def written(made: LLMatcher, seed: int) -> str:
    """A text that the grammar allows, chosen at random."""
    chance, made, text = random.Random(seed), made.deep_copy(), bytearray()
    while not made.is_stopped() and not (made.is_accepting() and chance.random() < 0.5):
        mask = made.compute_bitmask()
        allowed = [b for b in range(256) if mask[b // 8] >> (b % 8) & 1]
        if not allowed:
            break
        plain = [b for b in allowed if 32 <= b < 127 or b == 10]
        # What ends strings, values and calls comes often, so that texts stay short.
        ends = [b for b in plain if chr(b) in "\"'}])<>|\n"]
        byte = chance.choice(ends if ends and chance.random() < 0.5 else plain or allowed)
        text.append(byte)
        made.consume_token(byte)
        assert len(text) < 5000
    return text.decode()


@pytest.mark.parametrize("name", ONE_EACH)
def test_what_models_write_is_allowed(name):
    write = WRITERS[name]
    required = matcher(name, "required")
    assert allows(required, write(CALLS))
    assert allows(required, write(CALLS[:1]))
    assert not allows(required, "Paris is nice.")
    assert not allows(required, write([("no_such_function", {})]))
    assert not allows(matcher(name, "required", parallel=False), write(CALLS))
    assert allows(matcher(name, "required", parallel=False), write(CALLS[:1]))
    now = {"type": "function", "function": {"name": "now"}}
    assert allows(matcher(name, now), write(CALLS[1:]))
    assert not allows(matcher(name, now), write(CALLS[:1]))


@pytest.mark.parametrize("name", ["hermes", "longcat"])
def test_the_line_of_the_last_call_may_end(name):
    text = WRITERS[name](CALLS[:1])
    assert allows(matcher(name, "required"), text + "\n")
    assert not allows(matcher(name, "required"), text + "\n\n")
    assert not allows(matcher(name, "required"), text + "\nDone.")


@pytest.mark.parametrize("name", ONE_EACH)
def test_what_is_allowed_is_read(name):
    required = matcher(name, "required")
    for seed in range(8):
        text = written(required, seed)
        said = whole(make_answer_format(name, None).parser(tools=TOOLS, constrained=True), text)
        assert said.content == "", text
        assert said.calls, text
        for call in said.calls:
            assert call.name in ("get_weather", "now")
            value = call.value
            if call.name == "now":
                assert value == {}
            else:
                assert isinstance(value["city"], str), text
                assert value["unit"] in ("celsius", "fahrenheit")
                assert isinstance(value.get("days", 0), int)
                assert isinstance(value.get("exact", True), bool)


@pytest.mark.parametrize("name", ONE_EACH)
def test_strict_tools_under_auto(name):
    assert make_answer_format(name, None).grammar(TOOLS, "auto", True, NO_SPECIALS) is None
    auto = matcher(name, "auto", strict=True)
    write = WRITERS[name]
    assert allows(auto, "Paris is nice.")
    assert allows(auto, "")
    assert allows(auto, write(CALLS))
    assert not allows(auto, write([("get_weather", {"city": "Paris", "unit": "kelvin"})]))
    assert allows(matcher(name, "auto", strict=True, parallel=False), write(CALLS[:1]))


@pytest.mark.parametrize("name", ONE_EACH)
def test_models_with_tokens_for_the_marks(name):
    marks = (mark for mark in sorted(DECLARED[name].markers) if re.fullmatch(r"<[^<>]+>|\[[^\[\]]+\]", mark))
    tokenizer = byte_tokenizer(added=tuple(marks))
    vocabulary = build_vocabulary(tokenizer, tokenizer.vocab_size, [EOS])
    if name == "mistral":  # this is its later form then
        text = '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "unit": "celsius"}[TOOL_CALLS]now[ARGS]{}'
    else:
        text = WRITERS[name](CALLS)
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    for choice, before in (("required", ""), ("auto", "" if DECLARED[name].begins_at_start else "I look. ")):
        grammar = make_answer_format(name, None).grammar(strict, choice, True, tokenizer)
        assert grammar is not None
        made = LLMatcher(vocabulary, grammar, log_level=0)
        ids = tokenizer.encode(before + text, add_special_tokens=False)
        assert made.try_consume_tokens(ids) == len(ids), made.get_error() or grammar
        assert made.is_accepting()


def test_control_tokens_are_tokens():
    grammar = make_answer_format("hermes", None).grammar(TOOLS, "required", False, byte_tokenizer())
    assert grammar is not None
    assert "<[260]>" in grammar
    assert "tool_call" not in grammar


def test_a_tool_that_is_not_there_is_refused():
    with pytest.raises(RequestError, match="none of the tools") as refused:
        matcher("hermes", {"type": "function", "function": {"name": "later"}})
    assert refused.value.param == "tool_choice"


@pytest.mark.parametrize("name", ONE_EACH)
def test_free_arguments_where_no_schema_holds_them(name):
    tools = [
        {"type": "function", "function": {"name": "held", "strict": True, "parameters": WEATHER}},
        {"type": "function", "function": {"name": "free"}},
    ]
    write = WRITERS[name]
    for choice in ("auto", "required"):
        grammar = make_answer_format(name, None).grammar(tools, choice, True, NO_SPECIALS)
        assert grammar is not None
        made = LLMatcher(BYTES, grammar, log_level=0)
        assert made.get_error() == "", grammar
        for free in ({"any": [1, None], "other": "x"}, {"any": "x"}, {}):
            assert allows(made, write([("free", free)])), free
        assert not allows(made, write([("held", {"any": [1, None]})]))


def test_the_unnamed_properties_of_a_schema_that_says_so_are_allowed():
    tool = {"name": "f", "parameters": {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}}
    for parameters, other, is_allowed in (
        (tool["parameters"], 1, True),
        (tool["parameters"], "x", False),
        ({"properties": {"a": {}}}, 1, False),
        ({}, "x", True),
        (None, "x", True),
    ):
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        grammar = make_answer_format("hermes", None).grammar(tools, "required", True, NO_SPECIALS)
        assert grammar is not None
        text = WRITERS["hermes"]([("f", {"b": other})])
        assert allows(LLMatcher(BYTES, grammar, log_level=0), text) == is_allowed, json.dumps(parameters)
