"""Requests made to hurt, against a listening server: a clear 4xx or a right answer, and it serves on.

Nothing here is timed; what must be quick would otherwise take minutes, and the client gives up before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.attacking import CHAT, COMPLETIONS, MIB, TOKENIZE, Target, attacked, chat
from tests.server.serving import QUESTION


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    async with attacked() as attacked_server:
        yield attacked_server


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


class TestJson:
    @pytest.mark.parametrize("body", [b"[" * MIB, b'{"a":' * 500_000, b'{"messages":' + b"[" * 3 * MIB])
    async def test_depth_without_end(self, target: Target, body: bytes):
        await target.is_refused(CHAT, body, "body", "nested too deeply")

    @pytest.mark.parametrize(
        "field", ["tools", "tool_choice", "metadata", "chat_template_kwargs", "documents"]
    )
    async def test_depth_in_a_field(self, target: Target, field: str):
        await target.attack(CHAT, chat(**{field: nested(95)}))
        await target.attack(CHAT, chat(**{field: {"a": nested(95)}}))
        await target.attack(CHAT, chat(**{field: [{"type": "function", "function": {"a": nested(94)}}]}))

    async def test_a_name_twice_among_many(self, target: Target):
        names = ",".join(f'"a{i}":1' for i in range(200_000))
        await target.is_refused(CHAT, f'{{{names},"a199999":1}}'.encode(), "a199999", "twice")

    @pytest.mark.parametrize(
        "number", ["9" * 3 * MIB, "-" + "9" * MIB, "1e" + "9" * MIB, "0." + "1" * MIB + "e999999"]
    )
    @pytest.mark.parametrize("field", ["seed", "temperature", "metadata"])
    async def test_numbers_without_end(self, target: Target, number: str, field: str):
        await target.is_refused(CHAT, f'{{"messages": [], "{field}": {number}}}'.encode(), "body", "range")

    @pytest.mark.parametrize(
        "text",
        [
            rb"\ud800",
            rb"\udfff",
            rb"\ud800\ud800",
            rb"\udc00\ud800",
            rb"a\ud83d",
            b"\xed\xa0\x80",
            b"\xff",
            b"\xc0\x80",
        ],
    )
    async def test_lone_surrogates_and_broken_utf8(self, target: Target, text: bytes):
        for path, body in (
            (COMPLETIONS, b'{"prompt": "%s", "max_tokens": 1}'),
            (CHAT, b'{"messages": [{"role": "user", "content": "%s"}]}'),
            (CHAT, b'{"messages": [{"role": "%s", "content": ""}]}'),
            (CHAT, b'{"messages": [], "%s": 1}'),
            (CHAT, b'{"messages": [], "tools": [{"type": "function", "function": {"name": "%s"}}]}'),
        ):
            await target.is_refused(path, body % text, "body", "not valid JSON")

    @pytest.mark.parametrize(
        "text", ["\0", "\0" * 1000, "a\0b", "\u202e\ufeff\uffff", "\x7f\x1b[2J", "\r\n\r\nHTTP/1.1 200 OK"]
    )
    async def test_characters_nobody_types(self, target: Target, text: str):
        assert (await target.attack(COMPLETIONS, {"prompt": text, "max_tokens": 1})).status_code == 200
        message = {"role": "user", "content": text}
        assert (await target.attack(CHAT, chat(messages=[message]))).status_code == 200
        assert (await target.attack(CHAT, chat(stop=text, user=text))).status_code == 200
        await target.attack(CHAT, chat(request_id=text))
        ignored = await target.attack(CHAT, chat(**{text: 1}))
        assert ignored.headers["x-ignored-params"]

    async def test_unknown_names(self, target: Target):
        assert (await target.attack(CHAT, chat(**{"x" * 3 * MIB: 1}))).status_code == 200
        assert (await target.attack(CHAT, chat(**{f"a{i}": 1 for i in range(100_000)}))).status_code == 200
        async with attacked(strict_params=True) as strict:
            answer = await strict.attack(CHAT, chat(**{"x" * 3 * MIB: 1}))
            assert answer.status_code == 400
            assert len(answer.content) < 1000


class TestMessages:
    @pytest.mark.parametrize("role", ["w" * MIB, "", "\0", "__class__", "{{ 7 * 7 }}", "<|im_start|>"])
    async def test_roles(self, target: Target, role: str):
        await target.attack(CHAT, chat(messages=[{"role": role, "content": "x"}]))

    async def test_what_templates_must_not_run(self, target: Target):
        content = "{{ ''.__class__ }}{% for i in range(99999999) %}{% endfor %}"
        answer = await target.attack(TOKENIZE, {"messages": [{"role": "user", "content": content}]})
        assert content in target.served.llm.tokenizer.decode(answer.json()["tokens"])

    async def test_very_many_small_ones(self, target: Target):
        await target.is_refused(
            CHAT, chat(messages=[{"role": "user"}] * 90_000), "messages", "90000 messages"
        )
        await target.is_refused(CHAT, chat(messages=[{"role": "user"}] * 100_000), "body", "too many parts")
        await target.is_refused(
            CHAT, chat(messages=[{"role": "user", "content": [{"text": ""}] * 50_000}]), "messages"
        )

    async def test_calls_and_results_in_the_wrong_order(self, target: Target):
        calls = [{"id": f"c{i}", "function": {"name": "f", "arguments": "{}"}} for i in range(5000)]
        results = [{"role": "tool", "tool_call_id": f"c{i}", "content": "x"} for i in reversed(range(3000))]
        body = chat(messages=[*QUESTION, {"role": "assistant", "tool_calls": calls}, *results])
        await target.is_refused(CHAT, body, "messages")

    @pytest.mark.parametrize(
        "arguments", ["[" * 100_000, "[" * 900 + "]" * 900, "9" * 100_000, "NaN", "{", '"\ud800"']
    )
    async def test_arguments_of_earlier_calls(self, target: Target, arguments: str):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        await target.attack(CHAT, chat(messages=[*QUESTION, {"role": "assistant", "tool_calls": [call]}]))


LOOP = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"


class TestTemplates:
    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (LOOP, "was stopped: it takes more than 300,000 steps"),
            (f"{{{{ messages }}}}{LOOP}", "was stopped"),
            ("{% for i in range(10 ** 12) %}{% endfor %}", "Range too big"),
            ("{{ 'a' * 10 ** 9 }}", "was stopped: it makes a value"),
            ("{{ ''.join(messages[0].content for m in messages) }}", "not valid jinja2"),
            ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
            (
                "{{ ''.__class__.__mro__[1].__subclasses__() }}",
                "was stopped: access to attribute '__class__'",
            ),
            ("{{ cycler.__init__.__globals__.os }}", "was stopped: access to attribute '__init__'"),
            ("{{ lipsum.__globals__ }}", "'lipsum' is undefined"),
            ("{% include '/etc/passwd' %}", "no loader"),
            ("{{ " * 16_000, "chat_template"),
            ("{% if a %}" * 2000 + "{% endif %}" * 2000, "nested too deeply"),
            ("{{ " + "-" * 40_000 + "1 }}", "nested too deeply"),
            ("{{ 1" + "|abs" * 12_000 + "}}", "nested too deeply"),
            ("{{ a" + ".a" * 20_000 + "}}", "nested too deeply"),
            ("{" * 60_000, "at most 50000 characters"),
        ],
        ids=lambda text: text[:30],
    )
    async def test_templates(self, target: Target, template: str, message: str):
        answer = await target.attack(CHAT, chat(chat_template=template))
        assert answer.status_code == 400
        assert message in answer.text

    async def test_a_template_of_nothing_but_assignments(self, target: Target):
        await target.is_refused(CHAT, chat(chat_template="{% set a = 1 %}" * 3300), "messages", "no tokens")

    async def test_kwargs(self, target: Target):
        kwargs = {f"a{i}": i for i in range(50_000)}
        assert (await target.attack(CHAT, chat(chat_template_kwargs=kwargs))).status_code == 200
        for name in ("messages", "raise_exception"):
            await target.is_refused(CHAT, chat(chat_template_kwargs={name: 1}), "chat_template_kwargs")


class TestSizes:
    async def test_texts_and_lists(self, target: Target):
        await target.is_refused(COMPLETIONS, {"prompt": "a" * 3 * MIB}, "prompt")
        await target.is_refused(COMPLETIONS, {"prompt": ["a"] * 100_000}, "prompt")
        await target.is_refused(COMPLETIONS, {"prompt": [1] * MIB}, "prompt")
        await target.is_refused(CHAT, chat(stop=["a" * 1000] * 1000), "stop")
        await target.is_refused(CHAT, chat(logit_bias={str(i): 1 for i in range(100_000)}), "logit_bias")
        await target.is_refused(CHAT, chat(bad_words=["a"] * 100_000), "bad_words")

    async def test_tools_that_may_not_be_called(self, target: Target):
        tool = {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
        }
        await target.is_refused(CHAT, chat(tools=[tool] * 10_000, tool_choice="none"), "tools", "1024")
