"""A tool parser of your own: a plug-in that jaxserve and vLLM load as it is.

Models that were trained on code like to write their calls into a block of code, whatever the chat template asks for:

    Let me look that up.
    ```json
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    ```

This parser takes such blocks, one object or a list of them each, as calls.  To try it:

    jaxserve serve MODEL --enable-auto-tool-choice --tool-call-parser fenced_json \
        --tool-parser-plugin examples/tool_parser_plugin.py

and to see that it says the same whether its answers are streamed or not, wherever they are cut:

    jaxserve toolcheck --plugin examples/tool_parser_plugin.py
"""

# pyright: reportMissingImports=false
# (jaxserve makes vLLM's names up while it loads a plug-in; no vLLM is installed.)

from __future__ import annotations

import json
import re
from collections.abc import Sequence

try:  # vLLM since 0.30; jaxserve has the names at all places where vLLM ever had them
    from vllm.entrypoints.generate.base.protocol import (
        DeltaFunctionCall,
        DeltaMessage,
        DeltaToolCall,
        ExtractedToolCallInformation,
        FunctionCall,
        ToolCall,
    )
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
except ImportError:  # vLLM until 0.12
    from vllm.entrypoints.openai.protocol import (
        ChatCompletionRequest,
        DeltaFunctionCall,
        DeltaMessage,
        DeltaToolCall,
        ExtractedToolCallInformation,
        FunctionCall,
        ToolCall,
    )
    from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager

OPEN = "```json\n"
BLOCK = re.compile(r"```json\n(.*?)\n```", re.DOTALL)


@ToolParserManager.register_module("fenced_json")
class FencedJsonToolParser(ToolParser):
    """Reads the whole text again with each token, and tells what is new: short, and right by construction."""

    def __init__(self, tokenizer, tools=None):
        super().__init__(tokenizer, tools)
        self.num_told_characters = 0  # of the content
        self.num_told_calls = 0

    def extract_tool_calls(
        self, model_output: str, request: ChatCompletionRequest
    ) -> ExtractedToolCallInformation:
        """The calls in a whole answer, and the text around them."""
        content, calls = read(model_output)
        if not calls:
            content = model_output  # nothing more comes: what might have become a call is text
        return ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[ToolCall(function=call) for call in calls],
            content=content or None,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: ChatCompletionRequest,
    ) -> DeltaMessage | None:
        """What is new in an answer with one more token; None when nothing is certain yet."""
        content, calls = read(current_text)
        new_content = content[self.num_told_characters :]
        new_calls = [
            DeltaToolCall(
                index=index,
                id=ToolCall(function=call).id,
                type="function",
                function=DeltaFunctionCall(name=call.name, arguments=call.arguments),
            )
            for index, call in enumerate(calls)
            if index >= self.num_told_calls
        ]
        self.num_told_characters, self.num_told_calls = len(content), len(calls)
        if not new_content and not new_calls:
            return None
        return DeltaMessage(content=new_content or None, tool_calls=new_calls)


def read(text: str) -> tuple[str, list[FunctionCall]]:
    """What is certain in the beginning of an answer, or in all of it: content, and complete calls.

    A block that has not ended yet may become a call, so it is not told.
    """
    content, calls, position = "", [], 0
    for block in BLOCK.finditer(text):
        content += text[position : block.start()]
        found = calls_in(block[1])
        calls += found
        if not found:
            content += block[0]  # some other JSON
        position = block.end()
    rest = text[position:]
    begin = rest.find(OPEN)
    if begin < 0:  # perhaps the end is the beginning of a block
        length = next((n for n in range(len(OPEN) - 1, 0, -1) if rest.endswith(OPEN[:n])), 0)
        begin = len(rest) - length
    return content + rest[:begin], calls


def calls_in(block: str) -> list[FunctionCall]:
    """The calls that a block's JSON writes; none if it is something else."""
    try:
        value = json.loads(block)
    except ValueError:
        return []
    objects = value if isinstance(value, list) else [value]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in objects):
        return []
    return [
        FunctionCall(name=each["name"], arguments=json.dumps(each.get("arguments", {}), ensure_ascii=False))
        for each in objects
    ]
