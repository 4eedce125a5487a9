"""Harmony: messages with channels and recipients."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from jaxserve.server.parsing.answer_format import make_answer_format
from tests.server.tool_parsers import replaying
from tests.server.tool_parsers.replaying import Call, pieces, read, whole
from tests.server.tool_parsers.test_grammar import BYTES, NO_SPECIALS, allows

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
THOUGHT = "<|channel|>analysis<|message|>Hm. {x}<|end|>"
PREAMBLE = "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Done."
CALL = '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
EARLY_CALL = '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}'
BROWSER = "<|start|>assistant<|channel|>commentary to=browser.search<|message|>weather<|call|>"


def said(text: str, *, tools: list[dict[str, Any]] = TOOLS, reasoning: str | None = "openai_gptoss"):
    """What an answer says: reasoning, content, calls."""
    out = whole(make_answer_format("openai", reasoning).parser(tools=tools), text)
    return out.reasoning, out.content, out.calls


def test_messages_are_told_by_channel_and_recipient():
    call = Call("f", '{"a": 1}')
    assert said(THOUGHT + FINAL) == ("Hm. {x}", "Done.", [])
    assert said(THOUGHT + FINAL + "<|return|>", reasoning=None) == ("Hm. {x}", "Done.", [])
    assert said(THOUGHT + PREAMBLE + CALL) == ("Hm. {x}", "I look.", [call])
    assert said(THOUGHT + CALL + EARLY_CALL) == ("Hm. {x}", "", [call, call])
    assert said(' to=functions.f<|channel|>commentary<|message|>{"a": 1}') == ("", "", [call])
    assert said(THOUGHT + BROWSER + FINAL) == ("Hm. {x}weather", "Done.", [])
    assert said("<|channel|>commentary to=functions.f<|message|><|call|>") == ("", "", [Call("f", "{}")])
    assert said("Plain text.") == ("", "Plain text.", [])


def test_what_is_no_message_loses_no_text():
    for text in (
        "<|channel|>final",
        "<|channel|>com\nmentary<|message|>x",
        "<|channel|>commentary to=functions.f<|message|>{bad}",
        "1 < 2 <|chan",
    ):
        assert said(text) == ("", text, []), text


def test_without_tools_a_call_is_content():
    assert said(THOUGHT + CALL, tools=[]) == ("Hm. {x}", '{"a": 1}', [])
    out = whole(make_answer_format(None, "openai_gptoss").parser(), THOUGHT + FINAL)
    assert (out.reasoning, out.content) == ("Hm. {x}", "Done.")


def test_what_follows_a_call_that_was_announced_too_early_is_kept():
    text = CALL.replace("}<|call|>", "") + THOUGHT
    out = whole(make_answer_format("openai", None).parser(tools=TOOLS, constrained=True), text)
    assert (out.reasoning, out.content, out.calls) == ("Hm. {x}", "", [Call("f", '{"a": 1')])


@settings(max_examples=60)
@given(data=st.data(), cuts=replaying.cuts, constrained=st.booleans())
def test_pieces_do_not_matter(data, cuts, constrained):
    parts = st.one_of(
        st.sampled_from(
            [THOUGHT, PREAMBLE, FINAL, CALL, EARLY_CALL, BROWSER, "<|start|>", "<|message|>", " to=", "\n"]
        ),
        st.integers(0, 120).map(lambda n: CALL[:n]),
        replaying.json_text,
    )
    text = "".join(data.draw(st.lists(parts, max_size=6)))

    def make():
        return make_answer_format("openai", None).parser(tools=TOOLS, constrained=constrained)

    assert read(make(), [text]) == read(make(), pieces(text, cuts))


def test_a_cut_answer_invents_no_call():
    text = THOUGHT + CALL + CALL
    for end in range(len(text)):
        for constrained in (False, True):
            make = make_answer_format("openai", None).parser
            out = whole(make(tools=TOOLS, constrained=constrained), text[:end])
            for call in out.calls:
                assert call.name == "f"
                assert '{"a": 1}'.startswith(call.arguments)
                assert constrained or call.arguments == '{"a": 1}'


def _allows(choice: str, text: str, *, strict: bool = False) -> bool:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}]
    grammar = make_answer_format("openai", None).grammar(tools, choice, True, NO_SPECIALS)
    assert grammar is not None
    return allows(LLMatcher(BYTES, grammar, log_level=0), text)


def test_calls_can_be_constrained_with_thoughts_before_them():
    call = CALL.removeprefix("<|start|>assistant").removesuffix("<|call|>")
    assert _allows("required", call)
    assert _allows("required", THOUGHT + "<|start|>assistant" + call)
    assert not _allows("required", THOUGHT + FINAL)
    assert not _allows("required", call.replace("1", '"x"'))
    assert _allows("auto", THOUGHT + FINAL, strict=True)
    assert _allows("auto", THOUGHT + PREAMBLE + "<|start|>assistant" + call, strict=True)
    assert not _allows("auto", call.replace("1", '"x"'), strict=True)
    assert make_answer_format("openai", None).grammar(TOOLS, "auto", True, NO_SPECIALS) is None
