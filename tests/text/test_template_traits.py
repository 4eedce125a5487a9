"""What canaries find out about templates, and where the things go that a template does not write."""

from typing import Any

import pytest

from jaxserve.errors import RequestError
from jaxserve.text.chat_template import ChatTemplate
from tests.text.conversations import Marked
from tests.tiny import CHAT_TEMPLATE

USER = {"role": "user", "content": "Hi"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Does f.", "parameters": {"type": "object", "properties": {}}},
}
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
USERS_ONLY = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
SILENT = "{% for m in messages if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}{% endfor %}"
FIRST_SYSTEM_ONLY = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% endfor %}"
)
CALLS = (
    "{% for c in m.tool_calls or [] %}<{{ c.id }} {{ c.function.name }}({{ c.function.arguments | tojson }})>"
    "{% endfor %}"
)
FULL = "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + CALLS + "{% endfor %}"


def calling(*names: str, content: Any = None) -> dict[str, Any]:
    calls = [
        {"id": f"c{k}", "type": "function", "function": {"name": name, "arguments": f'{{"k": {k}}}'}}
        for k, name in enumerate(names)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(k: int, content: Any = "18") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{k}", "content": content}


def written(source: str, *messages: dict[str, Any], **options: Any) -> str:
    return ChatTemplate(source).render(messages, **options)


def test_a_template_that_can_everything_needs_no_help() -> None:
    source = "{{ tools or '' }}" + FULL
    assert ChatTemplate(source).traits.shortcomings == ()
    prompt = written(source, USER, calling("f", "g", content="So."), result(0), result(1, "19"))
    assert prompt == '[user]Hi[assistant]So.<c0 f({"k": 0})><c1 g({"k": 1})>[tool]18[tool]19'


@pytest.mark.parametrize("source", [USERS_ONLY, SILENT])
def test_results_and_calls_move_to_where_they_are_written(source: str) -> None:
    traits = ChatTemplate(source).traits
    assert {traits.shows_tools, traits.shows_tool_calls, traits.shows_tool_results} == {False}
    assert not traits.system.is_written
    assert len(traits.shortcomings) == 4
    prompt = written(source, USER, calling("f", "g", content="So."), result(1, "19"), result(0), calling("f"))
    assert prompt == (
        '[user]Hi[assistant]So.\n<tool_call>\n{"name": "f", "arguments": {"k": 0}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"k": 1}}\n</tool_call>'
        "[user]<tool_response>\n19\n</tool_response>\n<tool_response>\n18\n</tool_response>"
        '[assistant]<tool_call>\n{"name": "f", "arguments": {"k": 0}}\n</tool_call>'
    )


def test_calls_become_text_as_the_model_writes_them() -> None:
    prompt = written(PLAIN, USER, calling("f"), result(0), write_call=lambda name, json: f"{name}!{json}")
    assert prompt == '[user]Hi[assistant]f!{"k": 0}[tool]18'


def test_a_result_joins_the_users_next_message() -> None:
    prompt = written(SILENT, USER, calling("f"), result(0, [{"type": "text", "text": "18"}]), USER)
    assert prompt.endswith("[user]<tool_response>\n18\n</tool_response>\n\nHi")


def test_results_say_which_call_they_answer() -> None:
    source = FULL.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_call_id }}{{ m.name }}")
    first = {"role": "tool", "content": "18"}  # no id: the first call without a result
    prompt = written(source, USER, calling("f", "g"), result(1, "19"), first)
    assert prompt.endswith("[tool]19c1g[tool]18c0f")
    assert written(source, USER, calling("f"), result(7), {**result(0), "name": "x"}).endswith(
        "18c7[tool]18c0x"
    )
    assert written(source, USER, first).endswith("[tool]18")


@pytest.mark.parametrize("source", [USERS_ONLY, SILENT])
def test_system_messages_open_the_users(source: str) -> None:
    system, developer = {"role": "system", "content": "A"}, {"role": "developer", "content": "B"}
    answer = {"role": "assistant", "content": "x"}
    assert written(source, system, developer, USER, USER) == "[user]A\n\nB\n\nHi[user]Hi"
    assert written(source, USER, answer, system, USER) == "[user]Hi[assistant]x[user]A\n\nHi"
    assert written(source, USER, system, answer, system) == "[user]Hi\n\nA[assistant]x[user]A"
    parts = [{"type": "text", "text": "Hi"}]
    assert written(source, system, {"role": "user", "content": parts}) == "[user]A\nHi"


def test_later_system_messages_where_only_the_first_is_written() -> None:
    assert ChatTemplate(FIRST_SYSTEM_ONLY).traits.system.is_written
    system = {"role": "system", "content": "A"}
    answer = {"role": "assistant", "content": "x"}
    prompt = written(FIRST_SYSTEM_ONLY, system, system, USER, answer, system, USER)
    assert prompt == "[system]A\n\nA[user]Hi[assistant]x[user]A\n\nHi"


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    message = {"role": "developer", "content": "B"}
    assert written(PLAIN, message, USER) == "[system]B[user]Hi"
    knows = "{% for m in messages %}{% if m.role == 'developer' %}DEV{% endif %}{{ m.content }}{% endfor %}"
    assert written(knows, message, USER) == "DEVBHi"


def test_tools_that_the_template_does_not_show() -> None:
    system = {"role": "system", "content": "A"}
    assert written(PLAIN, system, USER, tools=[TOOL]) == "[system]A[user]Hi"
    for messages in ([system, USER], [{"role": "developer", "content": "A"}, USER]):
        prompt = written(PLAIN, *messages, tools=[TOOL], wants_tool_calls=True)
        assert prompt.startswith("[system]A\n\nYou can call these functions")
        assert (
            '\n{"type": "function", "function": {"name": "f", "description": "Does f.", "parameters": '
            in prompt
        )
        assert (
            '<tool_call>\n{"name": "function_name", "arguments": {"argument": "value"}}\n</tool_call>[user]Hi'
            in prompt
        )
    prompt = written(
        SILENT, USER, tools=[TOOL], wants_tool_calls=True, write_call=lambda name, json: f"{name}!{json}"
    )
    assert prompt.startswith("[user]You can call these functions")
    assert prompt.endswith('function_name!{"argument": "value"}\n\nHi')


def test_documents_that_the_template_does_not_show() -> None:
    documents = [{"title": "T", "text": "é"}]
    prompt = written(PLAIN, USER, documents=documents)
    assert prompt.startswith("[system]Use these documents")
    assert '\n{"title": "T", "text": "é"}\n</documents>[user]Hi' in prompt
    shows = "{% for d in documents or [] %}{{ d.title }}{% endfor %}" + PLAIN
    assert written(shows, USER, documents=documents) == "T[user]Hi"


def test_tools_have_vllms_keys() -> None:
    tool = {"function": {"parameters": None, "strict": True, "name": "f"}, "x": 1, "type": "function"}
    source = "{{ tools | tojson }}" + PLAIN
    assert written(source, USER, tools=[tool]).startswith(
        '[{"type": "function", "function": {"name": "f", "description": null, "parameters": null, '
        '"strict": true}, "x": 1}]'
    )
    needs = (
        "{% for t in tools or [] %}{{ t.function.name + t.function.description }}"
        "{{ t.function.parameters.properties.items() | list }}{% endfor %}"
    )
    assert not ChatTemplate(needs).traits.takes_bare_tools
    assert written(needs, USER, tools=[{"function": {"name": "f"}}]) == "f[]"


ONE_CALL = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls and m.tool_calls|length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}" + CALLS + "{% endfor %}"
)


def test_calls_one_by_one() -> None:
    assert not ChatTemplate(ONE_CALL).traits.takes_parallel_calls
    asked = [USER, calling("f", "g", content="So."), result(1, "19"), result(0), result(5, "?"), USER]
    assert written(ONE_CALL, *asked) == (
        '[user]Hi[assistant]So.<c0 f({"k": 0})>[tool]18[assistant]<c1 g({"k": 1})>[tool]19[tool]?[user]Hi'
    )


SPLIT = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is none %}"
    + CALLS
    + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
FIRST_CALL = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.tool_calls and messages|selectattr('role', 'eq', 'assistant')|list|length < 2 %}"
    + CALLS
    + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_text_beside_calls() -> None:
    traits = ChatTemplate(SPLIT).traits
    assert (traits.call_form, traits.takes_empty_text, traits.shows_tool_calls) == ("split", False, True)
    assert written(SPLIT, USER, calling("f"), result(0)) == '[user]Hi[assistant]<c0 f({"k": 0})>[tool]18'
    assert written(SPLIT, USER, calling("f", content="So."), result(0)) == (
        '[user]Hi[assistant]So.[assistant]<c0 f({"k": 0})>[tool]18'
    )
    assert not ChatTemplate(FIRST_CALL).traits.shows_tool_calls
    assert "So.\n<tool_call>" in written(FIRST_CALL, USER, calling("f", content="So."))


NINE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'tool' and m.tool_call_id|length != 9 %}"
    "{{ raise_exception('nine, please') }}{% endif %}{{ m.tool_call_id }}" + CALLS + "{% endfor %}"
)


def test_ids_of_nine_characters() -> None:
    assert not ChatTemplate(NINE).traits.takes_long_ids
    call = calling("f")
    call["tool_calls"][0]["id"] = "chatcmpl-tool-\ud800"
    prompt = written(NINE, USER, call, {"role": "tool", "content": "18"})
    short = prompt[-9:]
    assert prompt == f'[user]Hi[assistant]<{short} f({{"k": 0}})>[tool]18{short}'
    call["tool_calls"][0]["id"] = "abcDEF123"
    assert written(NINE, USER, call, {"role": "tool", "content": "18"}).endswith("18abcDEF123")


def test_arguments_that_would_be_written_as_python_are_text() -> None:
    source = FULL.replace(" | tojson", "")
    assert not ChatTemplate(source).traits.takes_argument_objects
    assert written(source, USER, calling("f")) == '[user]Hi[assistant]<c0 f({"k": 0})>'
    pythonic = FULL.replace(
        "{{ c.function.arguments | tojson }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    )
    assert written(pythonic, USER, calling("f")) == "[user]Hi[assistant]<c0 f(k=0)>"


def test_every_role_has_its_own_form() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% else %}{{ m.content + '' }}{% endif %}" + CALLS + "{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = [{"role": role, "content": parts} for role in ("system", "user", "assistant", "tool")]
    assert written(source, *asked) == "[system]a\nb[user]ab[assistant]a\nb[tool]a\nb"


def test_roles_that_nobody_writes_are_refused() -> None:
    assert written(PLAIN, USER, {"role": "wizard", "content": "Abra"}) == "[user]Hi[wizard]Abra"
    template = ChatTemplate(SILENT)
    for role in ("wizard", "w" * 100_000):
        with pytest.raises(
            RequestError, match=r"messages\[1\] has the role 'w.* writes nothing; use one of"
        ) as caught:
            template.render([USER, {"role": role, "content": "Abra"}])
        assert caught.value.param == "messages"
        assert len(str(caught.value)) < 300


def test_the_templates_own_words_name_the_message() -> None:
    source = (
        "{% for message in messages %}{% if message.content == 'bad' %}\n"
        "{{ raise_exception('not here') }}{% endif %}{{ message.content }}{% endfor %}"
    )
    with pytest.raises(
        RequestError, match=r'refused messages\[1\] \(role "assistant"\): not here \(line 2\)'
    ) as caught:
        written(source, USER, {"role": "assistant", "content": "bad"})
    assert caught.value.param == "messages"
    failing = "{% for m in messages %}\n{{ 1 / m.content|length }}{% endfor %}"
    with pytest.raises(RequestError, match=r'failed at messages\[1\] \(role "assistant"\): ZeroDiv.*line 2'):
        written(failing, USER, {"role": "assistant", "content": ""})


def test_the_message_is_named_by_its_place_in_the_request() -> None:
    source = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    system = {"role": "system", "content": "A"}
    with pytest.raises(RequestError, match=r"messages\[3\]"):
        written(source, system, system, USER, {"role": "user", "content": "bad"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10 ** 12) %}{% endfor %}", "Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "was stopped: it takes more",
        ),
        ("{{ 'a' * 10 ** 9 }}", "was stopped: it makes a value"),
        ("{{ ''.__class__.__mro__ }}", "was stopped: access to attribute '__class__'"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "calls itself without end"),
        ("{% include 'x' %}", "failed: TypeError: no loader"),
        (
            "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
            "cannot be compiled, probably for being nested too deeply",
        ),
        ("{% for i in x %}" * 100 + "{% endfor %}" * 100, "cannot be compiled"),
        ("{{ lipsum(10 ** 9) }}", "'lipsum' is undefined"),
    ],
)
def test_templates_of_ill_will(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(source).render([USER])
    assert caught.value.param in ("chat_template", "messages")


def test_the_templates_variables_are_known() -> None:
    template = ChatTemplate(
        "{% if enable_thinking is defined and not enable_thinking %}x{% endif %}{{ messages }}"
    )
    assert template.variables == {"enable_thinking", "messages"}


def test_the_little_template_of_other_tests() -> None:
    assert ChatTemplate(CHAT_TEMPLATE).traits.shortcomings == ()


def test_the_first_part_alone_is_no_way_to_take_parts() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content is string else m.content[0].text }}"
        "{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert written(source, {"role": "system", "content": parts}, USER) == "[system]a\nb[user]Hi"


def test_where_the_last_system_message_wins() -> None:
    source = (
        "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% endfor %}{{ ns.system }}{% for m in messages if m.role != 'system' %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    system, other = {"role": "system", "content": "A"}, {"role": "system", "content": "B"}
    answer = {"role": "assistant", "content": "x"}
    assert written(source, system, other, USER) == "A\n\nB[user]Hi"
    assert written(source, system, USER, answer, other, USER) == "A[user]Hi[assistant]x[user]B\n\nHi"


SYSTEM_AT_END = (
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]"
    "{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content }}: {% endif %}"
    "{{ m.content }}" + CALLS + "{% endfor %}"
)


def test_where_the_system_message_needs_a_users_last_message() -> None:
    assert not ChatTemplate(SYSTEM_AT_END).traits.writes_system_before_results
    system = {"role": "system", "content": "A"}
    assert written(SYSTEM_AT_END, system, USER) == "[user]A: Hi"
    assert written(SYSTEM_AT_END, system, USER, calling("f"), result(0)) == (
        '[user]A\n\nHi[assistant]<c0 f({"k": 0})>[tool]18'
    )


ALTERNATING = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.role != 'tool' and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}"
    "{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_where_text_beside_calls_breaks_the_turns() -> None:
    assert ChatTemplate(ALTERNATING).traits.call_form == "text"
    answer = {"role": "assistant", "content": "18."}
    again = [calling("f", "g", content="So."), result(0), result(1, "19"), answer, USER]
    assert written(ALTERNATING, USER, calling("f"), result(0), *again) == (
        '[user]Hi[assistant]<c0 f({"k": 0})>[tool]18[assistant]So.\n'
        '<tool_call>\n{"name": "f", "arguments": {"k": 0}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"k": 1}}\n</tool_call>'
        "[user]<tool_response>\n18\n</tool_response>\n\n<tool_response>\n19\n</tool_response>[assistant]18.[user]Hi"
    )


def test_developers_that_are_known_as_the_first_alone() -> None:
    source = (
        "{% for m in messages %}{% if m.role != 'developer' or loop.first %}[{{ m.role }}]{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    developer = {"role": "developer", "content": "B"}
    assert written(source, developer, USER, developer) == "[developer]B[user]Hi[system]B"


def test_templates_for_requests_with_tools_alone() -> None:
    source = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + FULL
    assert ChatTemplate(source).traits.shortcomings == ()
    assert written(source, USER, calling("f"), tools=[TOOL]) == 'f[user]Hi[assistant]<c0 f({"k": 0})>'


FORGETFUL = (
    *(PLAIN, USERS_ONLY, SILENT, FIRST_SYSTEM_ONLY, FULL, ONE_CALL),
    *(SPLIT, FIRST_CALL, NINE, SYSTEM_AT_END, ALTERNATING),
)


@pytest.mark.parametrize("source", FORGETFUL)
def test_nothing_vanishes(source: str) -> None:
    template = ChatTemplate(source)
    for seed in range(40):
        conversation = Marked(seed)
        prompt = template.render(conversation.messages, tools=[TOOL], wants_tool_calls=True)
        lost = [mark for mark in conversation.marks if mark not in prompt]
        assert lost == [], (seed, prompt)
        assert '"description": "Does f."' in prompt
