"""How models write calls in each built-in format: texts to check parsers with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Calls = Sequence[tuple[str, Mapping[str, Any]]]
Writer = Callable[[Calls], str]


def dumps(value: Any) -> str:
    """JSON as models write it."""
    return json.dumps(value, ensure_ascii=False)


def an_object(name: str, arguments: Mapping[str, Any], key: str = "arguments") -> str:
    """A call as an object."""
    return f'{{"name": {dumps(name)}, "{key}": {dumps(arguments)}}}'


def objects(calls: Calls, separator: str, key: str = "arguments") -> str:
    """Calls as objects."""
    return separator.join(an_object(name, arguments, key) for name, arguments in calls)


def tagged(start: str, end: str, between: str = "\n") -> Writer:
    """A writer of objects between tags."""
    return lambda calls: between.join(f"{start}{an_object(*call)}{end}" for call in calls)


def a_list(start: str, end: str, separator: str = ", ") -> Writer:
    """A writer of lists of objects."""
    return lambda calls: f"{start}{objects(calls, separator)}{end}"


def internlm(calls: Calls) -> str:
    """Action marks."""
    return "\n".join(
        f"<|action_start|><|plugin|>\n{an_object(*call, 'parameters')}<|action_end|>" for call in calls
    )


def python_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Python writes it."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def pythonic(start: str, end: str, separator: str = ", ") -> Writer:
    """A writer of Python's calls."""
    return lambda calls: f"{start}{separator.join(python_call(*call) for call in calls)}{end}"


def deepseek_v3(calls: Calls) -> str:
    """Arguments in a block of code."""
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Calls) -> str:
    """Name and arguments in a frame."""
    inner = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseek_v32(calls: Calls) -> str:
    """An element for each argument."""

    def argument(key: str, value: Any) -> str:
        is_text = isinstance(value, str)
        text = value if is_text else dumps(value)
        says = "true" if is_text else "false"
        return f'<｜DSML｜parameter name="{key}" string="{says}">{text}</｜DSML｜parameter>\n'

    inner = "\n".join(
        f'<｜DSML｜invoke name="{name}">\n{"".join(argument(*item) for item in arguments.items())}</｜DSML｜invoke>'
        for name, arguments in calls
    )
    return f"<｜DSML｜function_calls>\n{inner}\n</｜DSML｜function_calls>"


def kimi_k2(calls: Calls) -> str:
    """The id names the function."""
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{n}<|tool_call_argument_begin|>{dumps(arguments)}<|tool_call_end|>"
        for n, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def gemma(start: str, quote: str, end: str) -> Writer:
    """A writer of Gemma's braces."""

    def value(item: Any) -> str:
        if isinstance(item, str):
            return f"{quote}{item}{quote}"
        if isinstance(item, Mapping):
            return f"{{{','.join(f'{quote}{key}{quote}:{value(inner)}' for key, inner in item.items())}}}"
        if isinstance(item, list):
            return f"[{','.join(map(value, item))}]"
        return dumps(item)

    def write(calls: Calls) -> str:
        return "".join(
            f"{start}call:{name}{{{','.join(f'{key}:{value(item)}' for key, item in arguments.items())}}}{end}"
            for name, arguments in calls
        )

    return write


def plain(value: Any) -> str:
    """A value as text: strings as they are."""
    return value if isinstance(value, str) else dumps(value)


def functions(start: str, end: str, wrap: str) -> Writer:
    """A writer of elements whose names are in the tags."""

    def write(calls: Calls) -> str:
        return "\n".join(
            f"{start}\n<function={name}>\n"
            + "".join(
                f"<parameter={key}>{wrap}{plain(v)}{wrap}</parameter>\n" for key, v in arguments.items()
            )
            + f"</function>\n{end}"
            for name, arguments in calls
        )

    return write


def glm(calls: Calls) -> str:
    """Keys and values in turns."""
    return "\n".join(
        f"<tool_call>{name}\n"
        + "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{plain(v)}</arg_value>\n" for key, v in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )


def elements(
    call: tuple[str, str],
    argument: tuple[str, str],
    space: str,
    around: tuple[str, str, str],
    xml: bool = False,
) -> Writer:
    """A writer of elements whose names are attributes."""

    def text(value: Any) -> str:
        said = plain(value)
        is_special = set("<&") & set(said) or said != said.strip()
        return f"<![CDATA[{said}]]>" if xml and isinstance(value, str) and is_special else said

    def write(calls: Calls) -> str:
        inner = around[1].join(
            f'{call[0]}"{name}">{space}'
            + "".join(f'{argument[0]}"{key}">{text(v)}{argument[1]}{space}' for key, v in arguments.items())
            + call[1]
            for name, arguments in calls
        )
        return f"{around[0]}{inner}{around[2]}"

    return write


hermes = tagged("<tool_call>\n", "\n</tool_call>")

# By the first name of a registered format: one for each.
WRITERS: dict[str, Writer] = {
    "hermes": hermes,
    "granite4": hermes,
    "ernie45": hermes,
    "longcat": tagged("<longcat_tool_call>\n", "\n</longcat_tool_call>"),
    "jamba": a_list("<tool_calls>[\n    ", "\n]</tool_calls>", ",\n    "),
    "hunyuan_a13b": a_list("<tool_calls>[", "]</tool_calls>"),
    "granite": a_list("<|tool_call|>[", "]"),
    "granite-20b-fc": tagged("<function_call> ", "", " "),
    "internlm": internlm,
    "phi4_mini_json": a_list("functools[", "]"),
    "llama3_json": lambda calls: objects(calls, "; ", "parameters"),
    "mistral": a_list("[TOOL_CALLS][", "]"),
    "xlam": a_list("[", "]"),
    "pythonic": pythonic("[", "]"),
    "llama4_pythonic": pythonic("[", "]"),
    "olmo3": pythonic("<function_calls>", "</function_calls>", "\n"),
    "qwen3_coder": functions("<tool_call>", "</tool_call>", "\n"),
    "seed_oss": functions("<seed:tool_call>", "</seed:tool_call>", ""),
    "glm45": glm,
    "minimax_m2": elements(
        ("<invoke name=", "</invoke>"),
        ("<parameter name=", "</parameter>"),
        "\n",
        ("<minimax:tool_call>\n", "\n", "\n</minimax:tool_call>"),
    ),
    "step3": elements(
        ("<steptml:invoke name=", "</steptml:invoke>"),
        ("<steptml:parameter name=", "</steptml:parameter>"),
        "",
        (
            "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>",
            "<｜tool_call_end｜><｜tool_call_begin｜>function<｜tool_sep｜>",
            "<｜tool_call_end｜><｜tool_calls_end｜>",
        ),
    ),
    "minicpm5": elements(
        ("<function name=", "</function>"), ("<param name=", "</param>"), "", ("", "", ""), xml=True
    ),
    "deepseek_v3": deepseek_v3,
    "deepseek_v31": deepseek_v31,
    "deepseek_v32": deepseek_v32,
    "kimi_k2": kimi_k2,
    "gemma4": gemma("<|tool_call>", '<|"|>', "<tool_call|>"),
    "functiongemma": gemma("<start_function_call>", "<escape>", "<end_function_call>"),
    "lfm2": pythonic("<|tool_call_start|>[", "]<|tool_call_end|>"),
}
