"""Conversations as prompt text: content formats, tool calls, continuing, and what errors say."""

from typing import Any

import pytest

from jaxserve.errors import RequestError
from jaxserve.text.chat_template import ChatTemplate
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer

USER = {"role": "user", "content": "Hi"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
LOOPS_OVER_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}"
    "{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %};{% endfor %}"
)
TAKES_BOTH = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %};{% endfor %}"
)
IGNORES_PARTS = "{% for m in messages %}{{ m.content if m.content is string else '' }};{% endfor %}"


def assistant_call(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]


def test_a_plain_conversation() -> None:
    template = ChatTemplate(CHAT_TEMPLATE)
    prompt = template.render([{"role": "system", "content": "Be brief."}, USER])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not template.render([USER], add_generation_prompt=False).endswith("assistant\n")
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=False) == prompt


def test_special_tokens_documents_tools_and_kwargs_are_variables() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ documents | tojson }}{{ tools | tojson }}{{ mood }}{{ messages[0].content }}",
        {"bos_token": "<s>"},
    )
    prompt = template.render(
        [USER], tools=[{"type": "function"}], documents=[{"title": "D"}], template_kwargs={"mood": "calm"}
    )
    assert prompt == '<s>[{"title": "D"}][{"type": "function"}]calmHi'
    assert template.render([USER], template_kwargs={"bos_token": "!"}) == "!nullnullHi"
    with pytest.raises(RequestError, match="must not have 'tools'") as caught:
        template.render([USER], template_kwargs={"tools": []})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("source", "content_format", "text", "parts", "nothing"),
    [
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "string", "Hi;", "a\nb;", ";"),
        ("{% for m in messages %}{{ 'u' + m['content'] }};{% endfor %}", "string", "uHi;", "ua\nb;", "u;"),
        (
            "{% for m in messages %}{{ m.content | tojson }};{% endfor %}",
            "string",
            '"Hi";',
            '"a\\nb";',
            '"";',
        ),
        (IGNORES_PARTS, "string", "Hi;", "a\nb;", ";"),
        (LOOPS_OVER_PARTS, "openai", "user:[Hi];", "user:[a][b];", "user:;"),
        (TAKES_BOTH, "openai", "Hi;", "<a><b>;", ";"),
    ],
)
def test_contents_come_as_the_template_takes_them(
    source: str, content_format: str, text: str, parts: str, nothing: str
) -> None:
    template = ChatTemplate(source)
    assert template.content_format == content_format
    assert template.render([USER]) == text
    assert template.render([{"role": "user", "content": PARTS}]) == parts
    assert template.render([{"role": "user", "content": None}]) == nothing
    assert template.render([{"role": "user"}]) == nothing


def test_the_content_format_can_be_decided() -> None:
    message = {"role": "user", "content": PARTS}
    assert ChatTemplate(TAKES_BOTH, content_format="string").render([message]) == "a\nb;"
    assert ChatTemplate(TAKES_BOTH, content_format="openai").render([USER]) == "<Hi>;"


def test_parts_of_other_kinds_that_are_text() -> None:
    content = ["x", {"type": "input_text", "text": "y"}, {"type": "refusal", "refusal": "z"}, {"text": "w"}]
    prompt = ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": content}])
    assert prompt == "x\ny\nz\nw"


def test_the_messages_given_are_not_changed() -> None:
    messages = assistant_call('{"a": 1}')
    ChatTemplate(CHAT_TEMPLATE).render(messages)
    assert messages == assistant_call('{"a": 1}')


@pytest.mark.parametrize(
    ("arguments", "written"),
    [('{"a": "é"}', '{"a": "é"}'), ({"a": 1}, '{"a": 1}'), ("", "{}"), (None, "{}"), ("{no json", "{}")],
)
def test_arguments_are_objects_for_templates_that_write_json(arguments: Any, written: str) -> None:
    prompt = ChatTemplate(CHAT_TEMPLATE).render(assistant_call(arguments), add_generation_prompt=False)
    assert f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>' in prompt


@pytest.mark.parametrize(
    ("arguments", "written"), [('{"a":1}', '{"a":1}'), ({"a": 1}, '{"a": 1}'), (None, "{}")]
)
def test_arguments_are_text_for_templates_that_join_text(arguments: Any, written: str) -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ 'call ' + c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert ChatTemplate(source).render(assistant_call(arguments)) == f"Hicall f{written}"


def test_null_keys_and_empty_tool_calls_are_left_out() -> None:
    source = "{{ 'name' in messages[0] }}{{ 'tool_calls' in messages[0] }}{{ messages[0].content }}"
    message = {"role": "assistant", "content": "x", "name": None, "tool_calls": []}
    assert ChatTemplate(source).render([message]) == "FalseFalsex"


def test_reasoning_goes_by_both_its_names() -> None:
    source = "{{ messages[0].reasoning }}{{ messages[0].reasoning_content }}{{ messages[0].content }}"
    for name in ("reasoning", "reasoning_content"):
        assert ChatTemplate(source).render([{"role": "assistant", "content": "x", name: "hm"}]) == "hmhmx"


@pytest.mark.parametrize("content", ["The capital of", " of ", PARTS])
def test_continuing_the_final_message(content: Any) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    prompt = ChatTemplate(CHAT_TEMPLATE).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    text = content if isinstance(content, str) else "a\nb"
    assert prompt == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{text}"


def test_continuing_parts() -> None:
    prompt = ChatTemplate(LOOPS_OVER_PARTS).render(
        [{"role": "assistant", "content": PARTS}], add_generation_prompt=False, continue_final_message=True
    )
    assert prompt == "assistant:[a][b"


def test_continuing_where_the_template_trims_it() -> None:
    template = ChatTemplate("{{ messages[0].content | trim }}<end>")
    for content in ("so", "so "):
        prompt = template.render(
            [{"role": "assistant", "content": content}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
        assert prompt == "so"


def test_continuing_an_empty_message() -> None:
    message = {"role": "assistant", "content": None}
    for source in (LOOPS_OVER_PARTS, CHAT_TEMPLATE):
        prompt = ChatTemplate(source).render(
            [message], add_generation_prompt=False, continue_final_message=True
        )
        assert prompt in ("assistant:[", "<|im_start|>assistant\n")


def test_a_final_message_that_the_template_leaves_out_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="does not write the last message's text") as caught:
        ChatTemplate("{{ messages[0].role }}").render(
            [{"role": "assistant", "content": "x"}], add_generation_prompt=False, continue_final_message=True
        )
    assert caught.value.param == "continue_final_message"


def test_continuing_and_opening_a_turn_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="cannot both be true") as caught:
        ChatTemplate(CHAT_TEMPLATE).render([USER], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"content": "x"}], r"messages\[0\] must be an object with a role"),
        (["x"], r"messages\[0\] must be an object"),
        (
            [USER, {"role": "user", "content": 5}],
            r"messages\[1\]\.content must be a string or a list of parts, got int",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text must be a string, got None"),
        ([{"role": "user", "content": [5]}], r"content\[0\] must be an object with a type"),
        (
            [{"role": "user", "content": [PARTS[0], {"type": "image_url", "image_url": {"url": "x"}}]}],
            r"content\[1\] is of type 'image_url', but this model takes text only",
        ),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] must have a function with a name"),
    ],
)
def test_messages_that_cannot_be_used_are_named(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(CHAT_TEMPLATE).render(messages)
    assert caught.value.param == "messages"


def test_what_the_template_says_is_passed_on_with_its_line() -> None:
    template = ChatTemplate(
        "{{ messages[0].content }}\n{% if true %}\n{{ raise_exception('Roles must alternate') }}{% endif %}"
    )
    with pytest.raises(RequestError, match=r"Roles must alternate \(line 3\)") as caught:
        template.render([USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ 1 / 0 }}", r"ZeroDivisionError: division by zero \(line 2\)"),
        ("{{ messages[0].content + 1 }}", r"failed: TypeError: .* \(line 1\)"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
    ],
)
def test_a_template_at_fault(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(source).render([USER])
    assert caught.value.param == "chat_template"


def test_a_template_that_is_no_jinja() -> None:
    with pytest.raises(RequestError, match=r"not valid jinja2: .* \(line 2\)") as caught:
        ChatTemplate("a\n{% if %}")
    assert caught.value.param == "chat_template"
