"""What models are known to write in each format, beyond what all formats have in common."""

from __future__ import annotations

import json

import pytest

from jaxserve.server.parsing.answer_format import make_answer_format
from jaxserve.server.parsing.events import CallStart
from tests.server.tool_parsers.replaying import Call, whole

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def said(name: str, text: str) -> tuple[str, list[Call]]:
    """Content and calls of an answer."""
    out = whole(make_answer_format(name, None).parser(tools=TOOLS), text)
    return out.content, out.calls


def test_marks_in_prose_lose_no_text():
    for name, text in (
        ("hermes", "Use <tool_call> to call."),
        ("hermes", "1 < 2 and <tool> is no call"),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>{}</tool_call>"),
        ("jamba", "<tool_calls>[]</tool_calls>"),
        ("llama3_json", 'A map: {"name": "Bob", "age": 3} {x} {"a"'),
        ("llama3_json", '{"name": "f"}'),
        ("llama3_json", "<|python_tag|>print(1)"),
        ("mistral", "[TOOL_CALLS] is a mark"),
        ("mistral", "[TOOL_CALLS]f"),
        ("pythonic", "[1] says [f](x) and [f(a=1)]"),
        ("pythonic", "[f(1)]"),
        ("pythonic", "[f(a=g(1))]"),
        ("pythonic", "[f(a='x 'y' 'z), g(b='p 'q' 'r)]"),
        ("xlam", "```python\nx = [1]\n``` [TOOL"),
        ("phi4_mini_json", "from functools import reduce; functools[0]"),
    ):
        assert said(name, text) == (text, []), text


def test_objects_in_every_order_and_spacing():
    call = Call("f", '{"a": 1}')
    for text in (
        '{"name": "f", "arguments": {"a": 1}}',
        '{"arguments": {"a": 1}, "name": "f"}',
        '{ "name" : "f" ,\n"parameters":{"a": 1} }',
        '{"id": 7, "name": "f", "type": "function", "arguments": {"a": 1}, "why": ["x"]}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
    ):
        assert said("hermes", f"<tool_call>{text}</tool_call>") == ("", [call]), text
    for text, arguments in (
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "arguments": {}}', "{}"),
        ('{"name": "f", "arguments": {"n":1.50,"e":"\\u00e9"}}', '{"n":1.50,"e":"\\u00e9"}'),
        ('{"name": "f", "arguments": "Paris"}', '"Paris"'),
        ('{"name": "f", "arguments": "{Paris"}', '"{Paris"'),
        ('{"name": "f", "arguments": [1, {"]": "}"}]}', '[1, {"]": "}"}]'),
    ):
        assert said("hermes", f"<tool_call>\n{text}\n</tool_call>") == ("", [Call("f", arguments)]), text


def test_llama_joins_calls_with_semicolons():
    one, two = '{"name": "f", "parameters": {"a": 1}}', '{"type": "function", "name": "g", "arguments": {}}'
    calls = [Call("f", '{"a": 1}'), Call("g", "{}")]
    for text in (f"{one}; {two}", f"<|python_tag|>{one};{two}", f"{one} ;\n{two}", f"{one}\n{two}"):
        assert said("llama4_json", text) == ("", calls), text
    assert said("llama3_json", f"Here: {one} Shall I?") == ("Here:  Shall I?", calls[:1])
    assert said("llama3_json", f"{one}; Shall I?") == ("; Shall I?", calls[:1])


def test_both_generations_of_mistral():
    calls = [Call("f", '{"a": 1}'), Call("g", "{}")]
    old = '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'
    for text in (
        f"[TOOL_CALLS]{old}",
        f"[TOOL_CALLS] {old}",
        '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}',
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS] {}',
    ):
        assert said("mistral", text) == ("", calls), text
    parser = make_answer_format("mistral", None).parser(tools=TOOLS)
    events = parser.push("[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{}[TOOL_CALLS]g{}", ())
    ids = [event.id for event in events if isinstance(event, CallStart)]
    assert ids[0] == "abc123XYZ"
    assert len(ids[1]) == 9
    assert ids[1].isalnum()


@pytest.mark.parametrize("start", ["", "```json\n", "```\n", "[TOOL_CALLS]", "<tool_call>"])
def test_xlam_marks_its_list_in_many_ways(start):
    end = {"<tool_call>": "</tool_call>", "```json\n": "\n```", "```\n": "\n```"}.get(start, "")
    text = f'{start}[{{"name": "f", "arguments": {{"a": 1}}}}]{end}'
    assert said("xlam", text) == ("", [Call("f", '{"a": 1}')])
    before = "Let me see.\n" if start else ""
    assert said("xlam", before + text) == (before, [Call("f", '{"a": 1}')])


def test_granite_lists():
    for start in ("", "<|tool_call|>", "<tool_call>", "<|tool_call|> \n"):
        assert said("granite", start + '[{"name": "f", "arguments": {}}]') == ("", [Call("f", "{}")])


def test_llama4_pythonic_marks():
    assert said("llama4_pythonic", "<|python_start|>[f(a=1)]<|python_end|>") == ("", [Call("f", '{"a": 1}')])
    assert said("llama4_pythonic", " [f(a=1)]") == ("", [Call("f", '{"a": 1}')])


def test_literals_of_python_and_of_json():
    for literal, value in (
        ("'it\\'s \"x\" \\u00e9 \\x41 \\n \\q'", 'it\'s "x" é A \n \\q'),
        ('"東京 🎉 \\ud83c\\udf89"', "東京 🎉 🎉"),
        ("'''a 'b' \"\"\n'''", "a 'b' \"\"\n"),
        ("''", ""),
        ("[True, False, None, true, false, null]", [True, False, None, True, False, None]),
        ("[1, -2, 1.5e3, 1_000, .5, +4, 0x10, 07,]", [1, -2, 1.5e3, 1000, 0.5, 4, 16, 7]),
        ("{'a', \"b\", 1}", ["a", "b", 1]),
        ("{1}", [1]),
        ("{'a': {\"b\": []}, 'c': {}, }", {"a": {"b": []}, "c": {}}),
    ):
        content, calls = said("pythonic", f"[f(x = {literal} , y=1)]")
        assert content == "", literal
        assert json.loads(calls[0].arguments) == {"x": value, "y": 1}, literal
    for bad in (
        "1e999",
        "b'z'",
        "x",
        "'\\xzz'",
        "(1, 2)",
        "[" * 100 + "]" * 100,
        "'\\U00ffffff'",
        "{1: 2}",
        "9" * 50 + "x",
    ):
        text = f"[f(x={bad})]"
        assert said("pythonic", text) == (text, []), bad


def test_quotes_that_models_forget_to_escape():
    """They are a part of the text, unless something follows that can follow an argument."""
    for name, start, end in (("lfm2", "<|tool_call_start|>[", "]<|tool_call_end|>"), ("pythonic", "[", "]")):
        for value in ("sed -n '360,450p' /tmp/a.py", "echo 'a' 'b' \n 'c' d", "it's"):
            text = f"{start}f(command='{value}', n=['{value}']){end}"
            content, calls = said(name, text)
            assert content == ""
            assert json.loads(calls[0].arguments) == {"command": value, "n": [value]}


def test_a_good_call_survives_a_bad_one_behind_it():
    good, bad = "f(city='Paris')", "f(a=x 'y')"
    assert said("pythonic", f"[{good}, {bad}]") == (f", {bad}]", [Call("f", '{"city": "Paris"}')])
    first, second = ('{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {]}')
    assert said("jamba", f"<tool_calls>[{first}, {second}]</tool_calls>") == (
        f", {second}]</tool_calls>",
        [Call("f", "{}")],
    )


def test_kimi_names_are_ids():
    parser = make_answer_format("kimi_k2", None).parser(tools=TOOLS)
    frame = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    names = ("functions.f:0", "g:1", "functions.ns.h:2", "functions.f:0", "functions.bad.3", "functions.k:4")
    text = "".join(frame.format(name) for name in names)
    events = parser.push(f"<|tool_calls_section_begin|>{text}<|tool_calls_section_end|>", ())
    starts = [event for event in events if isinstance(event, CallStart)]
    assert [start.name for start in starts] == ["f", "g", "ns.h", "f", "k"]
    assert [start.id for start in starts[:3]] == list(names[:3])
    assert starts[3].id.startswith("chatcmpl-tool-")  # one that was there already


def test_gemma_values_without_marks():
    schema = {"type": "object", "properties": {"zip": {"type": "string"}, "n": {"type": "number"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    values = 'zip:0123, n:108.,flag:true,none:null,word:two words,deep:{<|"|>3<|"|>:[1,<|"|>]}<|"|>]}'
    text = f"<|tool_call>call:f{{{values}}}<tool_call|>"
    out = whole(make_answer_format("gemma4", None).parser(tools=tools), text)
    assert out.content == ""
    assert out.calls[0].value == {
        "zip": "0123",
        "n": 108.0,
        "flag": True,
        "none": None,
        "word": "two words",
        "deep": {"3": [1, "]}"]},
    }
    text = "<start_function_call>call:f{zip:<escape>5<escape>,n:<escape>5<escape>,s:<escape>a b<escape>}"
    out = whole(make_answer_format("functiongemma", None).parser(tools=tools), text)
    assert out.calls[0].value == {"zip": "5", "n": 5, "s": "a b"}


def test_deepseek_says_which_arguments_are_strings():
    argument = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>\n'
    inner = "".join(
        argument.format(*one)
        for one in (
            ("a", "true", ' 5 "q"\n<b>'),
            ("b", "false", " [1, null] "),
            ("c", "false", "no JSON"),
            ("n", "true", "5"),
        )
    )
    text = f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n{inner}</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    out = whole(make_answer_format("deepseek_v32", None).parser(tools=tools), text)
    assert out.content == ""
    assert out.calls[0].value == {"a": ' 5 "q"\n<b>', "b": [1, None], "c": "no JSON", "n": 5}


def test_arguments_that_deepseek_wraps():
    """One that the schema does not know, and that holds those that it knows, is no argument."""
    argument = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>\n'
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {}, "n": {}}}}}
    ]
    for key, is_string, value, wanted in (
        ("arguments", "false", ' {"city": "Paris", "n": 1} ', {"city": "Paris", "n": 1}),
        ("input", "true", '{"n": 1}', {"n": 1}),
        ("input", "true", '{"n": 1, "x": 2}', {"input": '{"n": 1, "x": 2}'}),
        ("input", "false", '{"n": 1, "x": 2}', {"input": {"n": 1, "x": 2}}),
        ("arguments", "false", "{}", {"arguments": {}}),
        ("arguments", "false", "no JSON", {"arguments": "no JSON"}),
        ("other", "false", '{"n": 1}', {"other": {"n": 1}}),
    ):
        call = f'<｜DSML｜invoke name="f">\n{argument.format(key, is_string, value)}</｜DSML｜invoke>\n'
        text = f"<｜DSML｜function_calls>\n{call}</｜DSML｜function_calls>"
        out = whole(make_answer_format("deepseek_v32", None).parser(tools=tools), text)
        assert [call.value for call in out.calls] == [wanted]
