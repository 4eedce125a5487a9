"""What plug-ins import from vLLM's utils does what they expect of it."""

from __future__ import annotations

import ast
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from partial_json_parser.core.exceptions import MalformedJSON
from partial_json_parser.core.options import Allow

from jaxserve.errors import RequestError
from jaxserve.server.parser_api import schemas
from jaxserve.server.parser_api.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolsParam,
    DeltaMessage,
    DeltaToolCall,
    FunctionCall,
    FunctionDefinition,
    InitialDeltaToolCall,
    ToolCall,
)
from jaxserve.server.plugins import partial_text as text
from jaxserve.server.plugins import python_text as python
from jaxserve.server.plugins.small_helpers import VLLMValidationError, init_logger, is_list_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
IDENTIFIERS = st.sampled_from(["a", "city", "from", "class", "x_1", "é"])


@given(st.text(max_size=12), st.text(max_size=12))
def test_prefix_and_suffix(a: str, b: str) -> None:
    """The longest there are."""
    prefix, suffix = text.find_common_prefix(a, b), text.find_common_suffix(a, b)
    assert a.startswith(prefix)
    assert b.startswith(prefix)
    assert a[len(prefix) : len(prefix) + 1] != b[len(prefix) : len(prefix) + 1] or prefix in (a, b)
    assert a.endswith(suffix)
    assert b.endswith(suffix)
    assert not any(character.isalnum() for character in suffix)


@pytest.mark.parametrize(
    ("new", "old", "diff"),
    [
        ('{"fruit": "apple"}', '{"fruit": "ap"}', "ple"),
        ('{"a": 1, "b": "x"}', '{"a": 1}', ', "b": "x"'),
        ('{"a": "}}"}', '{"a": "}"}', "}"),
        ("{}", "", "{}"),
        ("", "{}", ""),
    ],
)
def test_intermediate_diff(new: str, old: str, diff: str) -> None:
    """What is new between two completed texts, without what closes them."""
    assert text.extract_intermediate_diff(new, old) == diff


def test_small_text_helpers() -> None:
    """Positions and overlaps."""
    assert text.find_all_indices("ababa", "aba") == [0, 2]
    assert text.partial_tag_overlap("x <tool_", "<tool_call>") == 6
    assert text.partial_tag_overlap("<tool_call>", "<tool_call>") == 0
    assert text.consume_space(1, "a \n\tb") == 4
    assert text.consume_space(1, "a  ") == 3
    assert text.consume_space(9, "a") == 9
    assert text.is_complete_json(' {"a": [1]} ')
    assert not text.is_complete_json('{"a": [1}')


@given(JSON, st.text(alphabet=" {}x,;", max_size=5))
def test_partial_json(value: Any, rest: str) -> None:
    """The value and how much of the text it takes, with something behind it or cut off."""
    written = json.dumps(value)
    if isinstance(value, (dict, list, str)) and rest.strip():
        assert text.partial_json_loads(f" {written}{rest}", Allow.ALL) == (value, len(written) + 1)
    assert text.partial_json_loads(written, Allow.ALL) == (value, len(written))
    assert text.partial_json_loads('{"a": "b', Allow.ALL) == ({"a": "b"}, 8)
    with pytest.raises(MalformedJSON):
        text.partial_json_loads('{"a": tru!', Allow.ALL)


@given(st.dictionaries(IDENTIFIERS, JSON, max_size=3))
def test_python_calls(arguments: dict[str, Any]) -> None:
    """Any JSON arguments, written as Python, come back; keywords of Python's may be names of arguments."""
    written = f"[f({', '.join(f'{name}={value!r}' for name, value in arguments.items())})]"
    renamed, was_renamed = python.rename_reserved_kwargs(written)
    assert was_renamed == bool({"from", "class"} & set(arguments))
    call = ast.parse(renamed, mode="eval").body
    assert isinstance(call, ast.List)
    assert isinstance(call.elts[0], ast.Call)
    made = python.handle_single_tool(call.elts[0])
    assert made.function.name == "f"
    assert python.restore_reserved_kwarg_names(json.loads(made.function.arguments)) == arguments
    assert python.make_valid_python(renamed) == (renamed, "")


@given(st.dictionaries(st.sampled_from(["a", "city", "x_1"]), JSON, min_size=1, max_size=3), st.data())
def test_cut_off_calls(arguments: dict[str, Any], data: st.DataObject) -> None:
    """A cut-off call is completed to Python, whose arguments are the beginning of the real ones, or waited for."""
    written = f"[f({', '.join(f'{name}={value!r}' for name, value in arguments.items())}), g(b=2)]"
    cut = data.draw(st.integers(0, len(written)))
    completed = python.make_valid_python(written[:cut])
    if completed is None:
        return
    whole, added = completed
    assert whole.endswith(added)
    assert written.startswith(whole.removesuffix(added).rstrip(","))
    tree = ast.parse(whole, mode="eval").body
    assert isinstance(tree, ast.List)
    for call in tree.elts:
        assert isinstance(call, ast.Call)
        names = [keyword.arg for keyword in call.keywords]
        assert names in ([], ["b"]) or names == list(arguments)[: len(names)]


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("-1", -1),
        ("+2.5", 2.5),
        ("null", None),
        ("[true, false, None]", [True, False, None]),
        ("(1, 'a')", [1, "a"]),
        ("{'a'}", ["a"]),
        ("{'a': {'b': 1}}", {"a": {"b": 1}}),
        ("f'plain'", "plain"),
    ],
)
def test_literals(source: str, value: Any) -> None:
    """Python's literals and JSON's names."""
    assert python.get_parameter_value(ast.parse(source, mode="eval").body) == value


@pytest.mark.parametrize(
    "source", ["x", "b'bytes'", "...", "1j", "f'{x}'", "not 1", "-True", "{1: 2, **a}", "f()"]
)
def test_no_literals(source: str) -> None:
    """What JSON has no value for is refused."""
    with pytest.raises(python.UnexpectedAstError):
        python.get_parameter_value(ast.parse(source, mode="eval").body)


@pytest.mark.parametrize("source", ["a[0](x=1)", "f(**a)", "f()(x=1)", "(lambda: 1)(x=1)"])
def test_no_calls(source: str) -> None:
    """A called thing has a plain or dotted name, and named arguments."""
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    with pytest.raises(python.UnexpectedAstError):
        python.handle_single_tool(call)


def test_repairs_of_python() -> None:
    """Control characters, zeros and quotes as models write them."""
    assert python.escape_ctrl_chars_in_strings("f(a='x\ny\\\n', \nb=1)") == "f(a='x\\ny\\\n', \nb=1)"
    assert python.normalize_leading_zero_ints(
        "f(a=07, b=0, c=00, d=1.07, e=07.5, g='07', h=0x07, i=a07, j=1_0)"
    ) == ("f(a=7, b=0, c=00, d=1.07, e=07.5, g='07', h=0x07, i=a07, j=1_0)")
    broken = "[f(c='sed -n '1,5p' x.py', d=1)]"
    assert python.contains_broken_string_literal(broken)
    assert not python.contains_broken_string_literal("[f(c='fine', d='not clos")
    repaired, changed = python.escape_nested_quotes_in_strings(broken)
    assert changed
    assert ast.literal_eval(ast.parse(repaired, mode="eval").body.elts[0].keywords[0].value) == (  # pyright: ignore[reportAttributeAccessIssue]
        "sed -n '1,5p' x.py"
    )
    for left_alone in ("[f(c='a', b='c')]", "f('a' 'b'", broken[:20]):
        assert python.escape_nested_quotes_in_strings(left_alone) == (left_alone, False)
    with pytest.raises(python.UnexpectedAstError, match="match"):
        python.make_valid_python("[f(a=1]")
    assert python.safe_literal_eval(r"'\d'") == r"\d"


def test_tool_delta() -> None:
    """First the name with what is certain of the arguments, then more of them."""
    call = ToolCall(function=FunctionCall(name="f", arguments='{"a": "xy"}'))
    first = python.compute_tool_delta("", call, 0, '"}')
    assert first is not None
    assert first.function is not None
    assert (first.id, first.function.name, first.function.arguments) == (call.id, "f", '{"a": "xy')
    more = python.compute_tool_delta('{"a": "x', call, 0, '"}')
    assert more is not None
    assert more.function is not None
    assert (more.id, more.function.name, more.function.arguments) == (None, None, "y")
    assert python.compute_tool_delta('{"a": "xy"}', call, 0, "") is None
    with pytest.raises(ValueError, match="do not end with"):
        python.compute_tool_delta("", call, 0, "]")


def _tool(name: str, parameters: dict[str, Any] | None = None) -> ChatCompletionToolsParam:
    return ChatCompletionToolsParam(function=FunctionDefinition(name=name, parameters=parameters))


def test_schema_of_forced_calls() -> None:
    """Named: the parameters; required: a list of calls; the tools stay as they were."""
    shared = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/P"}},
        "$defs": {"P": {"type": "string"}},
    }
    tools = [_tool("f", shared), _tool("g")]
    named = ChatCompletionNamedToolChoiceParam.model_validate({"function": {"name": "f"}})
    assert schemas.get_json_schema_from_tools(named, tools) == shared
    required = schemas.get_json_schema_from_tools("required", tools, parallel_tool_calls=False)
    assert required is not None
    assert (required["type"], required["minItems"], required["maxItems"]) == ("array", 1, 1)
    assert required["$defs"] == {"P": {"type": "string"}}
    assert [call["properties"]["name"]["enum"] for call in required["items"]["anyOf"]] == [["f"], ["g"]]
    assert tools[0].function.parameters == shared
    assert schemas.get_json_schema_from_tools("auto", tools) is None
    assert schemas.find_tool_properties(tools, "f") == shared["properties"]
    assert schemas.find_tool_properties(tools, "h") == schemas.find_tool_properties(None, "f") == {}
    assert schemas.find_tool_name(tools, "g")
    other = _tool("h", {"$defs": {"P": {"type": "number"}}})
    with pytest.raises(RequestError, match="'P' in"):
        schemas.get_json_schema_from_tools("required", [*tools, other])
    with pytest.raises(RequestError, match="'f'"):
        schemas.get_json_schema_from_tools(named, [_tool("g")])


@pytest.mark.parametrize(
    ("value", "types", "made"),
    [
        ("7", "integer", 7),
        ("7.0", "number", 7),
        ("7.5", ["integer", "number"], 7.5),
        ("null", ["string", "null"], None),
        ("null", "string", "null"),
        ("True", "bool", True),
        ("0", "boolean", False),
        ('{"a": 1}', "dict", {"a": 1}),
        ("[1e999]", "array", "[1e999]"),
        ("inf", "number", "inf"),
        ("x", "integer", "x"),
        ('"quoted"', "unheard_of", "quoted"),
    ],
)
def test_coercion(value: str, types: Any, made: Any) -> None:
    """Text becomes the first type that it can be read as."""
    assert schemas.coerce_to_schema_type(value, types) == made


def test_types_of_schemas() -> None:
    """From type, enum, and nested choices."""
    schema = {"anyOf": [{"type": ["integer", "null"]}, {"enum": ["a", True, 1.5, [], {}]}]}
    everything = ["array", "boolean", "integer", "null", "number", "object", "string"]
    assert schemas.extract_types_from_schema(schema) == everything
    assert schemas.extract_types_from_schema({}) == schemas.extract_types_from_schema(None) == ["string"]


def test_protocol_defaults() -> None:
    """What parsers of different times expect of the same classes."""
    delta = DeltaToolCall(index=0, function=FunctionCall(name="f", arguments="").model_dump())  # pyright: ignore[reportArgumentType]  # as old parsers do
    assert (delta.id, delta.type) == (None, None)
    assert InitialDeltaToolCall(index=0).id
    assert ToolCall(function=FunctionCall(name="f", arguments="{}")).id.startswith("chatcmpl-tool-")
    assert (
        DeltaMessage(reasoning_content="x").reasoning == DeltaMessage(reasoning="x").reasoning_content == "x"
    )
    assert DeltaMessage(content="x").model_dump(exclude_none=True) == {"content": "x"}
    assert FunctionCall(id="native", name="f", arguments="").model_dump() == {"name": "f", "arguments": ""}


def test_logger_and_small_helpers(caplog: pytest.LogCaptureFixture) -> None:
    """A plug-in's words appear among the server's, some of them once."""
    logger = init_logger("probe")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            logger.warning_once("said %s", "once")
            logger.info("said again")
    assert [record.getMessage() for record in caplog.records] == ["said once", "said again", "said again"]
    assert {record.name for record in caplog.records} == {"jaxserve.plugins.probe"}
    assert is_list_of(["a", 1], str)
    assert not is_list_of(["a", 1], str, check="all")
    assert not is_list_of("a", str)
    error = VLLMValidationError("no", parameter="tools")
    assert isinstance(error, ValueError)
    assert error.param == "tools"
