"""Built-in formats of reasoning behind vLLM's interface."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.server.parser_api.reasoning import ReasoningParser, ReasoningParserManager
from jaxserve.server.plugins.formats import plugin_tokenizer
from jaxserve.server.plugins.load import load_plugin
from jaxserve.server.reasoning_parsers.registry import REASONING_FORMATS
from tests.tiny import byte_tokenizer

TOKENIZER = plugin_tokenizer(byte_tokenizer())
NAMES = sorted({form.names[0] for form in REASONING_FORMATS.values() if form.starts} - {"deepseek_r1"})


def make(name: str, **kwargs: Any) -> ReasoningParser:
    return ReasoningParserManager.get_reasoning_parser(name)(TOKENIZER, **kwargs)


def streamed(parser: ReasoningParser, text: str, size: int) -> tuple[str, str]:
    """Reasoning and content of a stream of pieces."""
    reasoning = content = ""
    for end in range(size, len(text) + size, size):
        before, now = text[: end - size], text[:end]
        ids = list(map(TOKENIZER.encode, (before, now, now[len(before) :])))
        delta = parser.extract_reasoning_streaming(before, now, now[len(before) :], *ids)
        if delta is not None:
            reasoning += delta.reasoning or ""
            content += delta.content or ""
    return reasoning, content


@pytest.mark.parametrize("name", NAMES)
def test_whole_and_streamed(name: str) -> None:
    form = REASONING_FORMATS[name]
    text = f"{form.starts[0]}First I think.{form.ends[0]}Then I answer."
    wanted = make(name).extract_reasoning(text, None)  # type: ignore[arg-type]  # not looked at
    if name == "minimax_m2_append_think":
        assert wanted == (None, f"<think>{text}")
    else:
        assert wanted == ("First I think.", "Then I answer.")
    for size in (1, 3, 100):
        parser = make(name)
        for _ in range(2):  # an empty previous text begins anew
            reasoning, content = streamed(parser, text, size)
            assert reasoning == (wanted[0] or "")
            assert content == (wanted[1] or "")


def test_text_is_held_back_only_where_it_may_be_a_mark() -> None:
    text = "I think </so. Yes\n"
    assert streamed(make("qwen3"), text, 1) == (text, "")
    assert streamed(make("qwen3"), "I think</thi", 1) == ("I think", "")


def test_where_the_template_opens_the_reasoning() -> None:
    text, plain = "I think.</think>Yes.", "Yes."
    request: Any = None
    assert make("qwen3").extract_reasoning(text, request) == ("I think.", "Yes.")
    assert make("qwen3").extract_reasoning(plain, request) == ("Yes.", None)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert make("qwen3", **off).extract_reasoning(plain, request) == (None, "Yes.")
    assert make("deepseek_v3").extract_reasoning(plain, request) == (None, "Yes.")
    on = {"chat_template_kwargs": {"thinking": True}}
    assert make("deepseek_v3", **on).extract_reasoning(text, request) == ("I think.", "Yes.")
    told = make("qwen3")
    told.set_prompt_token_ids(TOKENIZER.encode("Hi<think></think>"))
    assert told.extract_reasoning(plain, request) == (None, "Yes.")


def test_the_end_in_token_ids() -> None:
    parser = make("qwen3")
    ids = TOKENIZER.encode("<think>no</think>yes")
    assert parser.is_reasoning_end(ids)
    assert not parser.is_reasoning_end(TOKENIZER.encode("<think>no</think><think>"))
    assert TOKENIZER.decode(parser.extract_content_ids(ids)) == "yes"
    assert parser.extract_content_ids(TOKENIZER.encode("<think>no")) == []
    assert (parser.reasoning_start_str, parser.reasoning_end_str) == ("<think>", "</think>")


def test_plug_ins_can_derive_from_them(tmp_path: Any) -> None:
    file = tmp_path / "loud_plugin.py"
    file.write_text("""
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.qwen3_reasoning_parser import Qwen3ReasoningParser
@ReasoningParserManager.register_module("loud")
class Loud(Qwen3ReasoningParser):
    def extract_reasoning(self, model_output, request):
        reasoning, content = super().extract_reasoning(model_output, request)
        return reasoning.upper(), content
""")
    assert load_plugin(file).reasoning_parsers == ("loud",)
    request: Any = None
    assert make("loud").extract_reasoning("so</think>yes", request) == ("SO", "yes")
    assert {"loud", "qwen3", "mistral"} <= set(ReasoningParserManager.list_registered())
