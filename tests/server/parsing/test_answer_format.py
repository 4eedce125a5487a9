"""Reasoning and tool calls in one answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.server.parsing.answer_format import make_answer_format
from jaxserve.server.tool_parsers.tool_format import ToolFormat
from jaxserve.server.toolcheck.writers import hermes
from tests.server.tool_parsers import replaying
from tests.server.tool_parsers.replaying import Call, answer, pieces, read, whole
from tests.tiny import byte_tokenizer

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
]
CALL = hermes([("f", {"a": 1})])
THE_CALL = Call("f", '{"a": 1}')


def test_white_space_beside_calls_and_reasoning_is_dropped():
    parser = make_answer_format("hermes", "qwen3").parser
    said = whole(parser(tools=TOOLS), f"<think>\nhm\n</think>\n\n{CALL}\n{CALL}\n")
    assert (said.reasoning, said.content, said.calls) == ("\nhm\n", "", [THE_CALL, THE_CALL])
    said = whole(parser(tools=TOOLS), f"\n{CALL}\n")
    assert (said.content, said.calls) == ("", [THE_CALL])
    said = whole(parser(tools=TOOLS), f" a \n{CALL}\n b ")
    assert (said.content, said.calls) == (" a \n\n b ", [THE_CALL])


def test_calls_are_looked_for_only_if_there_are_tools():
    answer_format = make_answer_format("hermes", "qwen3")
    said = whole(answer_format.parser(), f"<think>t</think>{CALL}")
    assert (said.reasoning, said.content, said.calls) == ("t", CALL, [])
    assert whole(make_answer_format(None, None).parser(tools=TOOLS), CALL).content == CALL


def test_a_call_in_thoughts_is_a_call_where_models_do_that():
    thought = f"<think>I try {CALL} and see.</think>Done."
    said = whole(make_answer_format("hermes", "qwen3").parser(tools=TOOLS), thought)
    assert (said.reasoning, said.content, said.calls) == ("I try  and see.", "Done.", [THE_CALL])
    said = whole(make_answer_format("hermes", "deepseek_r1").parser(tools=TOOLS), thought)
    assert (said.reasoning, said.content, said.calls) == (f"I try {CALL} and see.", "Done.", [])


def test_a_mark_inside_arguments_ends_no_reasoning():
    call = hermes([("f", {"a": "</think>"})])
    said = whole(make_answer_format("hermes", "qwen3").parser(tools=TOOLS), f"<think>t{call}u</think>a")
    assert (said.reasoning, said.content) == ("tu", "a")
    assert said.calls[0].value == {"a": "</think>"}


@settings(max_examples=60)
@given(data=st.data(), cuts=replaying.cuts, reasoning=st.sampled_from(["qwen3", "deepseek_r1"]))
def test_pieces_do_not_matter(data, cuts, reasoning):
    parts = st.one_of(
        st.sampled_from(["<think>", "</think>", "<tool_call>", CALL, "\n\n", "</thi", "<tool", "a b"]),
        st.integers(0, len(CALL)).map(lambda n: CALL[:n]),
    )
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    make = make_answer_format("hermes", reasoning).parser
    assert read(make(tools=TOOLS), [text]) == read(make(tools=TOOLS), pieces(text, cuts))


def test_what_plug_ins_get_behind_reasoning():
    class Recorder:
        markers, is_marked, tells_reasoning = frozenset(("<tool_call>",)), False, False

        def __init__(self):
            self.pushed: list[tuple[str, list[int]]] = []

        def parser(self, tools, *, constrained=False, request=None):
            return self

        def grammar(self, tools, tool_choice, *, parallel_tool_calls, tokenizer):
            return None

        def push(self, text, token_ids):
            self.pushed.append((text, list(token_ids)))
            return []

        def finish(self):
            return []

    tokenizer = byte_tokenizer()
    answer_format, recorder = make_answer_format(None, "deepseek_r1"), Recorder()
    answer_format = type(answer_format)(recorder, answer_format.reasoning)
    parser = answer_format.parser(tools=TOOLS, tokenizer=tokenizer)
    parser.push("t", [116])
    parser.push("</think>a", [*b"</think>", 97])
    parser.push("b", [98])
    assert [text for text, _ in recorder.pushed] == ["a", "b"]
    assert recorder.pushed[1] == ("b", [98])
    assert answer(parser.finish()) == answer([])


def test_which_special_tokens_are_kept():
    tokenizer = byte_tokenizer()
    im_end = tokenizer.token_to_id("<|im_end|>")
    assert im_end in tokenizer.special_ids
    assert make_answer_format("hermes", "qwen3").kept_token_ids(tokenizer) == ()
    # A special token that is part of a mark.
    declared = make_answer_format("hermes", None)
    assert isinstance(declared.tools, ToolFormat)
    marked = replace(declared.tools, begins=("<|im_end|>call",))
    assert replace(declared, tools=marked).kept_token_ids(tokenizer) == (im_end,)


def test_where_reasoning_stands():
    def marks(name: str | None, prompt: str) -> tuple[str | None, str] | None:
        return make_answer_format(None, name).reasoning_marks(prompt)

    assert marks(None, "<think>") is None
    assert marks("qwen3", "…<think>\n") == (None, "</think>")
    assert marks("qwen3", "…<think>\n\n</think>\n\n") is None
    assert marks("qwen3", "…") == ("<think>", "</think>")
    assert marks("deepseek_r1", "…") == (None, "</think>")
    assert make_answer_format(None, "qwen3").reasoning_end("…") is None
    assert make_answer_format(None, "qwen3").reasoning_end("<think>") == "</think>"
