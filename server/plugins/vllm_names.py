"""Which of vLLM's modules and names plug-ins may import, and what stands behind them.

Every place since vLLM 0.6 that a name was at is listed: modules moved at 0.8, 0.11, 0.12, 0.13, 0.26 and 0.30.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from jaxserve.server.plugins.vllm_parsers import PARSER_MODULES, parser_classes

VERSION = "0.33.0"  # the newest vLLM whose places of these names are listed

_SERVER = "jaxserve.server"
_ABSTRACT = f"{_SERVER}.parser_api.abstract"
_REASONING = f"{_SERVER}.parser_api.reasoning"
_THINKING = f"{_SERVER}.parser_api.thinking"
_HELPERS = f"{_SERVER}.plugins.small_helpers"
_FOREIGN = f"{_SERVER}.plugins.foreign_types"


def _from(module: str, *names: str) -> dict[str, tuple[str, str]]:
    return {name: (module, name) for name in names}


# One module until vLLM 0.12, then several that import from each other: every one of them has every name.
_PROTOCOL = _from(
    f"{_SERVER}.parser_api.protocol",
    "ChatCompletionNamedFunction",
    "ChatCompletionNamedToolChoiceParam",
    "ChatCompletionToolsParam",
    "ChatMessage",
    "DeltaFunctionCall",
    "DeltaMessage",
    "DeltaToolCall",
    "ExtractedToolCallInformation",
    "FunctionCall",
    "FunctionDefinition",
    "InitialDeltaToolCall",
    "OpenAIBaseModel",
    "ToolCall",
) | _from(
    f"{_SERVER}.parser_api.requests",
    "ChatCompletionRequest",
    "JsonSchemaResponseFormat",
    "ResponseFormat",
    "ResponsesRequest",
    "StreamOptions",
)
_IDS = {
    "make_tool_call_id": (f"{_SERVER}.parser_api.protocol", "make_tool_call_id"),
    "random_tool_call_id": (f"{_SERVER}.parser_api.protocol", "make_tool_call_id"),  # its name in 0.9
}
_RANDOM_UUID = _from(f"{_SERVER}.parser_api.protocol", "random_uuid")
_STRUCTURED = _from("jaxserve.structured_outputs", "StructuredOutputsParams")
_TOOL_PARSERS = _from(_ABSTRACT, "ToolParser", "ToolParserManager")
_REASONING_PARSERS = _from(_REASONING, "ReasoningParser", "ReasoningParserManager")
_LISTS = _from(_HELPERS, "is_list_of")
_IMPORTS = _from(_HELPERS, "import_from_path")
_MISTRAL = _from(_FOREIGN, "MistralTokenizer")
_TOKENIZER = (f"{_SERVER}.plugins.tokenizer", "PluginTokenizer")
_UTILS = (
    _from(
        f"{_SERVER}.plugins.partial_text",
        "consume_space",
        "extract_intermediate_diff",
        "find_all_indices",
        "find_common_prefix",
        "find_common_suffix",
        "is_complete_json",
        "partial_json_loads",
        "partial_tag_overlap",
    )
    | _from(
        f"{_SERVER}.plugins.python_text",
        "UnexpectedAstError",
        "compute_tool_delta",
        "contains_broken_string_literal",
        "escape_ctrl_chars_in_strings",
        "escape_nested_quotes_in_strings",
        "get_parameter_value",
        "handle_single_tool",
        "make_valid_python",
        "normalize_leading_zero_ints",
        "rename_reserved_kwargs",
        "restore_reserved_kwarg_names",
        "safe_literal_eval",
    )
    | _from(
        f"{_SERVER}.parser_api.schemas",
        "coerce_to_schema_type",
        "extract_types_from_schema",
        "find_tool_name",
        "find_tool_properties",
        "get_json_schema_from_tools",
    )
    | {"Tool": (_ABSTRACT, "Tool")}
)

# Module: its names, each as the module and name that stand behind it.  Packages above are there without a line.
MODULES: Mapping[str, Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "vllm": {"__version__": (__name__, "VERSION")},
        "vllm.version": {"__version__": (__name__, "VERSION")},
        "vllm.config": _from(_FOREIGN, "ModelConfig"),
        "vllm.entrypoints.chat_utils": _IDS,
        "vllm.entrypoints.generate.base.protocol": _PROTOCOL,
        "vllm.entrypoints.mcp.tool_server": _from(_FOREIGN, "ToolServer"),
        "vllm.entrypoints.openai.chat_completion.protocol": _PROTOCOL,
        "vllm.entrypoints.openai.engine.protocol": _PROTOCOL,
        "vllm.entrypoints.openai.protocol": _PROTOCOL,
        "vllm.entrypoints.openai.responses.protocol": _PROTOCOL,
        "vllm.entrypoints.openai.tool_parsers": _TOOL_PARSERS,
        "vllm.entrypoints.openai.tool_parsers.abstract_tool_parser": _TOOL_PARSERS,
        "vllm.entrypoints.openai.tool_parsers.utils": _UTILS,
        "vllm.entrypoints.tool_server": _from(_FOREIGN, "ToolServer"),
        "vllm.envs": {
            "VLLM_ENFORCE_STRICT_TOOL_CALLING": (_HELPERS, "enforce_strict_tool_calling()"),
            "VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS": (_HELPERS, "tool_parse_regex_timeout()"),
        },
        "vllm.exceptions": _from(_HELPERS, "VLLMValidationError"),
        "vllm.logger": _from(_HELPERS, "init_logger"),
        "vllm.reasoning": _REASONING_PARSERS,
        "vllm.reasoning.abs_reasoning_parsers": _REASONING_PARSERS,
        "vllm.reasoning.basic_parsers": _from(_THINKING, "BaseThinkingReasoningParser"),
        "vllm.reasoning.deepseek_r1_reasoning_parser": _from(_THINKING, "DeepSeekR1ReasoningParser"),
        "vllm.reasoning.identity_reasoning_parser": _from(_THINKING, "IdentityReasoningParser"),
        "vllm.renderers.chat_utils": _IDS,
        "vllm.sampling_params": _STRUCTURED | _from("jaxserve.sampling_params", "SamplingParams"),
        "vllm.tokenizers": {"TokenizerLike": _TOKENIZER, **_MISTRAL},
        "vllm.tokenizers.mistral": _MISTRAL,
        "vllm.tokenizers.protocol": {"TokenizerLike": _TOKENIZER},
        "vllm.tool_parsers": _TOOL_PARSERS,
        "vllm.tool_parsers.abstract_tool_parser": {**_TOOL_PARSERS, "Tool": (_ABSTRACT, "Tool")},
        "vllm.tool_parsers.tool_strict_level": _from(_FOREIGN, "ToolStrictLevel"),
        "vllm.tool_parsers.utils": _UTILS,
        "vllm.transformers_utils.tokenizer": {"AnyTokenizer": _TOKENIZER, **_MISTRAL},
        "vllm.transformers_utils.tokenizers": _MISTRAL,
        "vllm.transformers_utils.tokenizers.mistral": _MISTRAL,
        "vllm.utils": _RANDOM_UUID | _LISTS | _IMPORTS,
        "vllm.utils.collection_utils": _LISTS,
        "vllm.utils.import_utils": _IMPORTS,
        "vllm.utils.mistral": _from(_HELPERS, "is_mistral_tokenizer"),
    }
)

_PACKAGES = frozenset(
    parent
    for name in (*MODULES, *PARSER_MODULES)
    for parent in [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
)


def is_vllm(module: str) -> bool:
    """Whether a module is, or would be, vLLM's."""
    return module == "vllm" or module.startswith("vllm.")


def is_served(module: str) -> bool:
    """Whether plug-ins may import a module of vLLM's."""
    return module in MODULES or module in PARSER_MODULES or module in _PACKAGES


def members(module: str) -> Iterator[tuple[str, Any]]:
    """The names of a module that is served, and what stands behind them."""
    for name, (home, attribute) in MODULES.get(module, {}).items():
        call = attribute.endswith("()")
        value = getattr(importlib.import_module(home), attribute.removesuffix("()"))
        yield name, value() if call else value
    yield from parser_classes(module)
