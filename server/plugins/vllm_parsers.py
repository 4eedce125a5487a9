"""vLLM's own parsers, for plug-ins that derive from one: here they are the built-in formats' classes."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

# The class, the module that it is in (since vLLM 0.6, wherever it has moved to), and the format's name.
_CLASSES = (
    ("DeepSeekV31ToolParser", "deepseekv31_tool_parser", "deepseek_v31"),
    ("DeepSeekV32EngineToolParser", "deepseekv32_engine_tool_parser", "deepseek_v32"),
    ("DeepSeekV32ToolParser", "deepseekv32_tool_parser", "deepseek_v32"),
    ("DeepSeekV3ToolParser", "deepseekv3_tool_parser", "deepseek_v3"),
    ("Ernie45ToolParser", "ernie45_tool_parser", "ernie45"),
    ("FunctionGemmaToolParser", "functiongemma_tool_parser", "functiongemma"),
    ("Gemma4EngineToolParser", "gemma4_engine_tool_parser", "gemma4"),
    ("Gemma4ToolParser", "gemma4_tool_parser", "gemma4"),
    ("Glm47MoeModelToolParser", "glm47_moe_tool_parser", "glm47"),
    ("Glm4MoeModelToolParser", "glm4_moe_tool_parser", "glm45"),
    ("GptOssToolParser", "gptoss_tool_parser", "openai"),
    ("Granite20bFCToolParser", "granite_20b_fc_tool_parser", "granite-20b-fc"),
    ("Granite4ToolParser", "granite4_tool_parser", "granite4"),
    ("GraniteEngineToolParser", "granite_engine_tool_parser", "granite"),
    ("GraniteToolParser", "granite_tool_parser", "granite"),
    ("Hermes2ProToolParser", "hermes_tool_parser", "hermes"),
    ("HunyuanA13BToolParser", "hunyuan_a13b_tool_parser", "hunyuan_a13b"),
    ("Internlm2ToolParser", "internlm2_tool_parser", "internlm"),
    ("JambaToolParser", "jamba_tool_parser", "jamba"),
    ("KimiK2ToolParser", "kimi_k2_tool_parser", "kimi_k2"),
    ("Lfm2ToolParser", "lfm2_tool_parser", "lfm2"),
    ("Llama3JsonToolParser", "llama_tool_parser", "llama3_json"),
    ("Llama4PythonicToolParser", "llama4_pythonic_tool_parser", "llama4_pythonic"),
    ("LongcatFlashToolParser", "longcat_tool_parser", "longcat"),
    ("MiniCPM5XMLToolParser", "minicpm5xml_tool_parser", "minicpm5"),
    ("MinimaxM2ToolParser", "minimax_m2_tool_parser", "minimax_m2"),
    ("MistralToolParser", "mistral_tool_parser", "mistral"),
    ("Olmo3PythonicToolParser", "olmo3_tool_parser", "olmo3"),
    ("OpenAIToolParser", "openai_tool_parser", "openai"),
    ("Phi4MiniJsonToolParser", "phi4mini_tool_parser", "phi4_mini_json"),
    ("PythonicToolParser", "pythonic_tool_parser", "pythonic"),
    ("Qwen3CoderToolParser", "qwen3coder_tool_parser", "qwen3_coder"),
    ("Qwen3EngineToolParser", "qwen3_engine_tool_parser", "qwen3_coder"),
    ("Qwen3XMLToolParser", "qwen3xml_tool_parser", "qwen3_xml"),
    ("SeedOssEngineToolParser", "seed_oss_engine_tool_parser", "seed_oss"),
    ("SeedOssToolParser", "seed_oss_tool_parser", "seed_oss"),
    ("Step3ToolParser", "step3_tool_parser", "step3"),
    ("xLAMToolParser", "xlam_tool_parser", "xlam"),
)
_PACKAGES = ("vllm.tool_parsers", "vllm.entrypoints.openai.tool_parsers")
_REASONING_CLASSES = (
    ("DeepSeekV3ReasoningParser", "deepseek_v3_reasoning_parser", "deepseek_v3"),
    ("DeepSeekV3ReasoningWithThinkingParser", "deepseek_v3_reasoning_parser", "holo2"),
    ("Ernie45ReasoningParser", "ernie45_reasoning_parser", "ernie45"),
    ("Gemma4ReasoningParser", "gemma4_reasoning_parser", "gemma4"),
    ("Glm4MoeModelReasoningParser", "glm4_moe_reasoning_parser", "glm45"),
    ("GptOssReasoningParser", "gptoss_reasoning_parser", "openai_gptoss"),
    ("GraniteReasoningParser", "granite_reasoning_parser", "granite"),
    ("HunyuanA13BReasoningParser", "hunyuan_a13b_reasoning_parser", "hunyuan_a13b"),
    ("KimiK2ReasoningParser", "kimi_k2_reasoning_parser", "kimi_k2"),
    ("MiniMaxM2AppendThinkReasoningParser", "minimax_m2_reasoning_parser", "minimax_m2_append_think"),
    ("MiniMaxM2ReasoningParser", "minimax_m2_reasoning_parser", "minimax_m2"),
    ("MistralReasoningParser", "mistral_reasoning_parser", "mistral"),
    ("NemotronV3ReasoningParser", "nemotron_v3_reasoning_parser", "nemotron_v3"),
    ("Olmo3ReasoningParser", "olmo3_reasoning_parser", "olmo3"),
    ("Qwen3ReasoningParser", "qwen3_reasoning_parser", "qwen3"),
    ("SeedOSSReasoningParser", "seedoss_reasoning_parser", "seed_oss"),
    ("Step3ReasoningParser", "step3_reasoning_parser", "step3"),
    ("Step3p5ReasoningParser", "step3p5_reasoning_parser", "step3p5"),
)

_TOOL_MODULES = {
    f"{package}.{module}": {cls: name} for package in _PACKAGES for cls, module, name in _CLASSES
}
_TOOL_MODULES |= {package: {cls: name for cls, _, name in _CLASSES} for package in _PACKAGES}
_REASONING_MODULES = {
    f"vllm.reasoning.{module}": {cls: name for cls, home, name in _REASONING_CLASSES if home == module}
    for _, module, _ in _REASONING_CLASSES
}

# Module: the classes that it has, each with its format's name.
PARSER_MODULES = MappingProxyType(_TOOL_MODULES | _REASONING_MODULES)


def parser_classes(module: str) -> Iterator[tuple[str, type]]:
    """The classes of a module of vLLM's."""
    for cls, name in PARSER_MODULES.get(module, {}).items():
        found = _builtin(name, is_reasoning=module in _REASONING_MODULES)
        assert found is not None
        yield cls, found


def _builtin(name: str, *, is_reasoning: bool) -> type | None:
    # Imported late: they need every format, and those what plug-ins derive from.
    if is_reasoning:
        from jaxserve.server.reasoning_parsers.declared import builtin_reasoning_parser

        return builtin_reasoning_parser(name)
    from jaxserve.server.tool_parsers.declared import builtin_tool_parser

    return builtin_tool_parser(name)
