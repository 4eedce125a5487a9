"""Every built-in format of reasoning, under the names of vLLM's --reasoning-parser."""

from __future__ import annotations

from types import MappingProxyType

from jaxserve.server.parser_api.class_registry import format_named
from jaxserve.server.parser_api.reasoning import ReasoningParserManager
from jaxserve.server.reasoning_parsers.reasoning_format import ReasoningFormat
from jaxserve.server.tool_parsers.harmony import HarmonyReasoning

_FORMATS: tuple[ReasoningFormat | HarmonyReasoning, ...] = (
    # Templates that do not say, or models that leave the beginning mark out.
    ReasoningFormat(("deepseek_r1", "holo2", "step3", "step3p5"), is_usual=True),
    ReasoningFormat(("minimax_m2",), is_usual=True, has_calls=True),
    ReasoningFormat(("minimax_m2_append_think",), is_content=True),
    # Thinking can be switched off in the template, which then closes it in the prompt, or does not open it.
    ReasoningFormat(("deepseek_v3", "deepseek_v4", "olmo3")),
    ReasoningFormat(("qwen3", "mimo", "nemotron_v3", "glm45", "glm47", "kimi_k2"), has_calls=True),
    ReasoningFormat(("seed_oss",), ("<seed:think>",), ("</seed:think>",), has_calls=True),
    ReasoningFormat(("ernie45",), is_usual=True, answer_marks=("<response>", "</response>")),
    ReasoningFormat(
        ("hunyuan_a13b",),
        ("<think>\n", "<think>"),
        ("\n</think>", "</think>"),
        answer_marks=("<answer>\n", "\n</answer>"),
    ),
    ReasoningFormat(
        ("granite",),
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
    ReasoningFormat(("mistral",), ("[THINK]",), ("[/THINK]",), has_calls=True),
    ReasoningFormat(
        ("gemma4",), ("<|channel>thought\n", "<|channel>thought"), ("<channel|>",), has_calls=True
    ),
    HarmonyReasoning(),
)

REASONING_FORMATS = MappingProxyType({name: entry for entry in _FORMATS for name in entry.names})


def find_reasoning_parser(name: str) -> ReasoningFormat | HarmonyReasoning:
    """The format of that name.  Raises ConfigError, listing the names, if there is none."""
    return format_named(name, REASONING_FORMATS, "reasoning_parser", ReasoningParserManager.registry)
