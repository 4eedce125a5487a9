"""Values between tags become what the schema says, whatever the pieces; what models leave out is done without."""

# ruff: noqa: E501
# (texts as models write them)

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from jaxserve.server.parsing.answer_format import make_answer_format
from jaxserve.server.tool_parsers.coercion import as_json, property_types
from jaxserve.server.tool_parsers.xml_tags import FORMATS
from jaxserve.server.toolcheck.writers import WRITERS
from tests.server.tool_parsers import replaying
from tests.server.tool_parsers.replaying import answer, pieces, read, whole
from tests.server.tool_parsers.test_grammar import BYTES, NO_SPECIALS, allows

NAMES = [entry.names[0] for entry in FORMATS]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "exact": {"type": "boolean"},
        "items": {"type": "array"},
        "point": {"$ref": "#/$defs/Point"},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "level": {"enum": ["low", "high"]},
    },
    "$defs": {"Point": {"type": "object"}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]

# Texts in which nothing ends a value: no tag, and no white space at the ends that a format takes for its own.
texts = st.text(st.sampled_from('ab \n"\\{}[]1=:é🎉/>'), max_size=20).filter(
    lambda text: text == text.strip("\n")
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": texts,
        "count": st.integers(-(10**9), 10**9),
        "ratio": st.floats(-1e6, 1e6) | st.integers(-9, 9),
        "exact": st.booleans(),
        "items": st.lists(replaying.json_values.filter(lambda v: "<" not in json.dumps(v)), max_size=3),
        "point": st.dictionaries(st.sampled_from("xy"), st.integers() | texts, max_size=2),
        "maybe": st.none() | st.integers(),
        "level": st.sampled_from(["low", "high"]),
    },
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(values=st.lists(arguments, min_size=1, max_size=2), cuts=replaying.cuts, constrained=st.booleans())
def test_values_come_back_with_their_types(name, values, cuts, constrained):
    text = WRITERS[name]([("f", each) for each in values])
    parser = make_answer_format(name, None).parser(tools=TOOLS, constrained=constrained)
    assert [call.value for call in answer(read(parser, pieces(text, cuts))).calls] == values


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("7", {"type": "integer"}, 7),
        (" 7 ", {"type": "integer"}, 7),
        ("07", {"type": "integer"}, 7),
        ("7.5", {"type": "int"}, 7.5),
        ("seven", {"type": "integer"}, "seven"),
        ("1e999", {"type": "number"}, "1e999"),
        ("nan", {"type": "float"}, "nan"),
        ("True", {"type": "boolean"}, True),
        ("0", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ("null", {"type": "integer"}, None),
        ("null", {"type": "string"}, "null"),
        ("null", {"type": "string", "nullable": True}, None),
        ("NULL", {"type": ["string", "null"]}, None),
        ("7", {"type": ["string", "null"]}, "7"),
        ("7", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 7),
        ("7", {"oneOf": [{"type": "string"}, {"type": "null"}]}, "7"),
        ('{"a": 1}', {"anyOf": [{"type": "object"}, {"type": "string"}]}, {"a": 1}),
        ("{'a': None, 'b': (1, 2)}", {"type": "object"}, {"a": None, "b": [1, 2]}),
        ("(1, 2)", {"type": "array"}, [1, 2]),
        ("{1, 2", {"type": "object"}, "{1, 2"),
        ("[1]", {"type": "object"}, [1]),
        ("low", {"enum": ["low", "high"]}, "low"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"const": "2"}, "2"),
        (' "kept" ', {"type": "string"}, ' "kept" '),
        ("5", {}, "5"),
        ('{"a": [1, 2.0]}', {}, {"a": [1, 2.0]}),
        (" [1, ", {}, " [1, "),
        ("5", {"description": "anything"}, "5"),
        ("5", {"$ref": "#/$defs/N"}, 5),
        ("5", {"$ref": "#/$defs/Loop"}, "5"),
        ("5", {"$ref": "http://elsewhere"}, "5"),
        ("5", True, "5"),
    ],
)
def test_what_a_text_becomes(text: str, schema: Any, value: Any):
    loop = {"$ref": "#/$defs/Loop"}
    root = {"properties": {"p": schema}, "$defs": {"N": {"type": "integer"}, "Loop": loop}}
    made = json.loads(as_json(text, property_types(root, "p")))
    assert made == value
    assert type(made) is type(value)


def test_the_models_own_text_is_kept():
    types = property_types(SCHEMA, "items")
    assert as_json('[1,  2.50,"\\u00e9"]', types) == '[1,  2.50,"\\u00e9"]'
    assert as_json("2.50", property_types(SCHEMA, "ratio")) == "2.50"


CITY = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
PARIS = {"city": "Paris", "days": 2}

LOOSE = {
    "qwen3_coder": [
        "<tool_call><function=weather><parameter=city>Paris</parameter><parameter=days>2</parameter></function></tool_call>",
        "<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>2</parameter>\n</function>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n</tool_call>",
    ],
    "seed_oss": [
        "<seed:tool_call><function=weather><parameter=city>Paris</parameter><parameter=days> 2 </parameter></function></seed:tool_call>",
    ],
    "glm47": [
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key><arg_value>2</arg_value></tool_call>",
        "<tool_call>\nweather\n<arg_key> city </arg_key> <arg_value>Paris</arg_value>\n\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
    ],
    "minimax_m2": [
        "<minimax:tool_call><invoke name='weather'><parameter name=city>Paris</parameter><parameter name='days' >2</parameter></invoke></minimax:tool_call>",
    ],
    "step3": [
        '<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜>\n<steptml:invoke name="weather">\n<steptml:parameter name="city">'
        'Paris</steptml:parameter>\n<steptml:parameter name="days">2</steptml:parameter>\n</steptml:invoke>\n<｜tool_call_end｜>\n'
        "<｜tool_calls_end｜>",
    ],
    "minicpm5": [
        '<function name="weather"> <param name="city"><![CDATA[Paris]]></param><param name="days">2</param> </function>',
        '<function name="weather"><param name="city">P&#97;ris</param><param name="days">&#x32;</param></function>',
        '<functionname="weather"><paramname="city">Paris</param> <param name="days">2</param></function>',
        "<function name='weather'><param name='city'>Paris</param><param name=days>2</param></function>",
        '<function\u0120name="weather">\u010a<param\u0120name="city">Paris</param><param\u0120name="days">2</param></function>',
        '<function\n  id="c1" name = "weather" ><param type="string" name="city"> Paris\n</param><param name="days">\n2 </param></function>',
        '<function name="weather" id="c1"><arguments><param name="city">Paris</param><param name="days">2</param></arguments></function>',
        '<function name="weather"><!-- the days --><param name="days">2</param> then <param name="city">Paris</param></function>',
        '<function name="weather"><param name="unit">C &lt; F</param><param name="city">Paris</param><param name="x"/><param name="days">2</param></function>',
        """<function name="weather"><param name="properties">{'city': 'Paris', 'days': 2, 'x': None}</param></function>""",
        '<function name="weather"><param name="arguments">{"days": "2"}</param><param name="city">Paris</param></function>',
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in LOOSE.items() for text in texts])
def test_other_ways_of_writing_the_same(name: str, text: str):
    for cuts in ((), range(1, 999), range(7, 999, 7)):
        parser = make_answer_format(name, None).parser(tools=WEATHER)
        said = answer(read(parser, pieces(text, cuts)))
        assert [(call.name, call.value) for call in said.calls] == [("weather", PARIS)]
        assert said.content == ""


@pytest.mark.parametrize(
    "text",
    [
        '<function name="weather"><param>Paris</param><param name="days">2</param></function>',
        '<function name="weather"><param name="city">Paris</param><param name="city">Rome</param></function>',
        '<function name="weather"><param name="city">Paris</param>',
        '<function name="weather"><param name="properties">Paris</param></function>',
        """<function name="weather"><param name="arguments">{'city': 'a'}</param><param name="city">b</param></function>""",
        '<function name="weather"><function name="weather"><param name="city">Paris</param></function>',
        '<function name=""><param name="city">Paris</param></function>',
        '<function id="weather"></function>',
        "<functions name='weather'></functions>",
        '<function name="weather"><params name="city">Paris</params></function>',
        f'<function name="weather">{"is what it is called " * 20}</function>',
        "a <function of x> and <param y>",
    ],
)
def test_what_is_no_call_of_minicpm5(text: str):
    """It stays content, byte for byte; in a call that was not ended there may be a whole one."""
    for cuts in ((), range(1, 999)):
        said = answer(read(make_answer_format("minicpm5", None).parser(tools=WEATHER), pieces(text, cuts)))
        if text.count("<function name") == 2:
            assert ([call.value for call in said.calls], said.content) == ([{"city": "Paris"}], text[:25])
        else:
            assert (said.calls, said.content) == ([], text)


def test_values_of_minicpm5_as_they_are_meant():
    """White space around a value is no part of it, but in CDATA it is; functions without arguments have none."""
    schema = {"properties": {"a": {"type": "string"}, "b": {"type": ["integer", "null"]}, "c": {}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for text, value in (
        ('<param name="a"> <![CDATA[ x\n]]>\n</param>', {"a": " x\n"}),
        ('<param name="a">\n1 &amp; 2\n</param><param name="b"> null </param>', {"a": "1 & 2", "b": None}),
        ('<param name="a"></param><param name="c">[1, 2]</param>', {"a": "", "c": [1, 2]}),
        ('<param name="a"/>', {"a": ""}),
        ('<param name="d">x</param>', {}),
        ("", {}),
    ):
        for cuts in ((), range(1, 999)):
            parser = make_answer_format("minicpm5", None).parser(tools=tools)
            said = answer(read(parser, pieces(f'<function name="f">{text}</function>', cuts)))
            assert [call.value for call in said.calls] == [value]


def test_values_that_speak_of_tags():
    """A tag with an argument's name at a line's beginning ends a value; others do not."""
    code = 'x = "<parameter=other>"\n<parameter=other>\n</function>\nend'
    text = WRITERS["qwen3_coder"]([("weather", {"city": code})])
    said = whole(make_answer_format("qwen3_coder", None).parser(tools=WEATHER), text)
    assert said.calls[0].value == {"city": code}
    html = "<b>1 &lt; 2</b> & more"
    text = WRITERS["minicpm5"]([("weather", {"city": html})])
    assert "CDATA" in text
    said = whole(make_answer_format("minicpm5", None).parser(tools=WEATHER), text)
    assert said.calls[0].value == {"city": html}


@pytest.mark.parametrize("name", NAMES)
def test_constrained_texts_and_schemas(name: str):
    """Strings keep to length, enums to their values, other types to JSON; tools without properties are free."""
    properties = {
        "code": {"type": "string", "maxLength": 3},
        "level": {"enum": ["low", "high"]},
        "many": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "maybe": {"type": ["string", "null"]},
    }
    held = {"name": "held", "parameters": {"properties": properties, "required": ["level"]}}
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": held},
        {"type": "function", "function": {"name": "free"}},
    ]
    grammar = make_answer_format(name, None).grammar(tools, "required", False, NO_SPECIALS)
    assert grammar is not None
    made = LLMatcher(BYTES, grammar, log_level=0)
    assert made.get_error() == "", grammar
    write = WRITERS[name]
    assert allows(made, write([("held", {"code": "abc", "level": "low", "many": [1, 2], "maybe": "x"})]))
    assert allows(made, write([("held", {"level": "high"})]))
    assert allows(made, write([("free", {"any": "thing"})]))
    assert not allows(made, write([("held", {"code": "abc"})]))
    assert not allows(made, write([("held", {"code": "abcd", "level": "low"})]))
    assert not allows(made, write([("held", {"level": "medium"})]))
    assert not allows(made, write([("held", {"level": "low", "many": [1, 2, 3]})]))


def test_random_cuts_of_a_long_answer():
    """Everything at once: prose, calls, and values with line ends, in random pieces."""
    value = "line\n" * 300 + "<b>"
    chance = random.Random(5)
    for name in NAMES:
        text = f"Here:\n{WRITERS[name]([('f', {'text': value, 'count': 3}), ('f', {'exact': True})])}\nDone."
        first = None
        for _ in range(5):
            cuts = [chance.randrange(len(text)) for _ in range(30)]
            said = read(make_answer_format(name, None).parser(tools=TOOLS), pieces(text, cuts))
            first = first or said
            assert said == first
        assert first is not None
        assert [call.value for call in answer(first).calls] == [{"text": value, "count": 3}, {"exact": True}]
        assert answer(first).content == "Here:\n\nDone."
