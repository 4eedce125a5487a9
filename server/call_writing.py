"""How the models of a --tool-call-parser write a call: learnt from our chat template for them."""

from __future__ import annotations

import functools

from jaxserve.server.chat_templates import named_template
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tool_text import CallWriter, hermes_call

# For each parser one of the templates whose models it reads; without one, calls are written as Hermes does.
_TEMPLATES = {
    "deepseek_v3": "deepseekv3",
    "deepseek_v31": "deepseekv31",
    "functiongemma": "functiongemma",
    "glm45": "glm4",
    "glm47": "glm4",
    "granite": "granite",
    "granite-20b-fc": "granite_20b_fc",
    "hunyuan_a13b": "hunyuan_a13b",
    "internlm": "internlm2_tool",
    "llama3_json": "llama3.1_json",
    "llama4_json": "llama4_json",
    "llama4_pythonic": "llama4_pythonic",
    "mistral": "mistral",
    "phi4_mini_json": "phi4_mini",
    "pythonic": "toolace",
    "qwen3_coder": "qwen3coder",
    "qwen3_xml": "qwen3coder",
    "xlam": "xlam_qwen",
}


@functools.cache
def call_writer(tool_call_parser: str | None) -> CallWriter:
    """What writes a call so that this parser reads it.  For chat templates that do not write calls themselves."""
    name = _TEMPLATES.get(tool_call_parser or "")
    source = None if name is None else named_template(name)
    return hermes_call if source is None else functools.partial(_written, source)


def _written(source: str, name: str, arguments: str) -> str:
    """The assistant's turn that is this call alone, without what opens and ends a turn."""
    template = _compiled(source)
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}
    question = {"role": "user", "content": "?"}
    opened = template.render([question])
    said, called = (
        template.render([question, {"role": "assistant", **answer}], add_generation_prompt=False)
        for answer in ({"content": "Said."}, {"tool_calls": [call]})
    )
    before, _, end_of_turn = said.rpartition("Said.")
    # Some templates write empty thoughts before everything that an assistant says.
    begin = before if called.startswith(before) else opened
    return called.removeprefix(begin).removesuffix(end_of_turn).strip()


@functools.cache
def _compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "", "eos_token": ""})
