"""Helpers of vLLM's plug-ins for calls that models write as Python: `[f(a=1), g(b="x")]`, whole or cut off."""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from jaxserve.server.parser_api.protocol import DeltaFunctionCall, DeltaToolCall, FunctionCall, ToolCall

_STRING = r"""(?P<quote>['"])(?:\\.|(?!(?P=quote))[^\\])*(?:(?P=quote)|\\?\Z)"""  # a literal, perhaps cut off
_CONTROL = re.compile(r"\\.|[\n\r\t\0]", re.DOTALL)
_CONTROL_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\0": r"\x00"}
_KEYWORD_ARGUMENT = re.compile(rf"{_STRING}|(?P<before>[(,]\s*)(?P<name>[^\W\d]\w*)(?=\s*=(?!=))", re.DOTALL)
_INTEGER = re.compile(rf"{_STRING}|[^\W\d]\w*|(?<!\.)(?P<digits>\d[\d_]*+)(?![.eEjJ])|\d[\d_]*+", re.DOTALL)
_LITERAL = re.compile(rf"\\.|{_STRING}", re.DOTALL)
_CLOSES_STRING = re.compile(r"\s*[,)\]}:]")  # what may follow a string literal in a call
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_NAMED_BY = {"(": "=", "{": ":"}  # what stands between a name and its value
_CLOSED_BRACKETS = re.compile(r"\[[^\[\](){}]*\]|\([^\[\](){}]*\)|\{[^\[\](){}]*\}")
_JSON_NAMES = {"null": None, "true": True, "false": False}
_RESERVED_SUFFIX = "_pyreservedkw_"


class UnexpectedAstError(Exception):
    """A text is Python, but no list of calls with literal arguments."""


def safe_literal_eval(text: str) -> Any:
    """ast.literal_eval without warnings about escapes."""
    with _quiet():
        return ast.literal_eval(text)


def get_parameter_value(val: ast.expr) -> Any:
    """The JSON value of a literal; null, true and false count as literals.  Raises UnexpectedAstError."""
    match val:
        case ast.Constant(value=bool() | str() | int() | float() | None):
            return val.value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List() | ast.Tuple() | ast.Set():
            return [get_parameter_value(each) for each in val.elts]
        case ast.Dict() if all(isinstance(key, ast.Constant) for key in val.keys):
            pairs = zip(val.keys, val.values, strict=True)
            return {
                key.value: get_parameter_value(each) for key, each in pairs if isinstance(key, ast.Constant)
            }
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
            if not isinstance(number, bool):
                return -number if isinstance(val.op, ast.USub) else number
        case ast.JoinedStr() if all(isinstance(part, ast.Constant) for part in val.values):
            return "".join(str(part.value) for part in val.values if isinstance(part, ast.Constant))
    raise UnexpectedAstError(f"not a JSON value: {ast.unparse(val)}")


def handle_single_tool(call: ast.Call) -> ToolCall:
    """The tool call of a Python call with keyword arguments.  Raises UnexpectedAstError."""
    name = ast.unparse(call.func)
    if not all(part.isidentifier() for part in name.split(".")):
        raise UnexpectedAstError(f"not a function's name: {name}")
    if any(each.arg is None for each in call.keywords):
        raise UnexpectedAstError("arguments must have names")
    arguments = {each.arg: get_parameter_value(each.value) for each in call.keywords}
    return ToolCall(function=FunctionCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False)))


def make_valid_python(text: str) -> tuple[str, str] | None:
    """A cut-off list of calls, closed, and what closes it; None where a name or value has only begun.

    Raises UnexpectedAstError for brackets that do not match.
    """
    open_brackets, open_quote = _open_marks(text)
    text = text.rstrip()
    innermost = open_brackets[-1] if open_brackets else ""
    if innermost in _NAMED_BY and not _is_last_entry_named(text, _NAMED_BY[innermost]):
        return None
    if not open_quote:
        if text.endswith(("=", ":")) or (innermost in _NAMED_BY and (text[-1].isalnum() or text[-1] in "._")):
            return None  # a number or a word may go on
        text = text.removesuffix(",")
        if innermost == "[" and not text.endswith(("[", ")")):
            return None
    added = open_quote + "".join(_CLOSING[mark] for mark in reversed(open_brackets))
    try:
        with _quiet():
            tree = ast.parse(text + added)
    except (SyntaxError, ValueError):
        return None
    is_cut_off_dict = "}" in added and any(isinstance(node, ast.Set) for node in ast.walk(tree))
    return None if is_cut_off_dict or not tree.body else (text + added, added)


def compute_tool_delta(
    previously_sent_args: str, new_call: ToolCall, index: int, withheld_suffix: str
) -> DeltaToolCall | None:
    """What a call has more than was sent, but for `withheld_suffix`, which only closes what is cut off.

    Raises ValueError when the arguments do not end with the suffix.
    """
    arguments = new_call.function.arguments
    if not arguments.endswith(withheld_suffix):
        raise ValueError(f"arguments {arguments!r} do not end with {withheld_suffix!r}")
    arguments = arguments[: len(arguments) - len(withheld_suffix)]
    if not previously_sent_args:
        function = DeltaFunctionCall(name=new_call.function.name, arguments=arguments)
        return DeltaToolCall(id=new_call.id, type="function", index=index, function=function)
    new = arguments[len(previously_sent_args) :]
    return DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=new)) if new else None


def escape_ctrl_chars_in_strings(text: str) -> str:
    """Write line ends, tabs and zero bytes inside string literals as escapes, so that Python reads them."""

    def escape(found: re.Match[str]) -> str:
        return _CONTROL_ESCAPES.get(found[0], found[0])

    return re.sub(_STRING, lambda literal: _CONTROL.sub(escape, literal[0]), text, flags=re.DOTALL)


def rename_reserved_kwargs(text: str) -> tuple[str, bool]:
    """Rename keyword arguments that are Python's own words (`f(from=1)`); the text, and whether any was.

    `restore_reserved_kwarg_names` gives the arguments their names back.
    """

    def rename(found: re.Match[str]) -> str:
        name = found["name"]
        return f"{found[0]}{_RESERVED_SUFFIX}" if name and keyword.iskeyword(name) else found[0]

    renamed = _KEYWORD_ARGUMENT.sub(rename, text)
    return renamed, renamed != text


def restore_reserved_kwarg_names(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments under the names that `rename_reserved_kwargs` took from them."""
    return {
        stem
        if (stem := str(name).removesuffix(_RESERVED_SUFFIX)) != name and keyword.iskeyword(stem)
        else name: value
        for name, value in arguments.items()
    }


def normalize_leading_zero_ints(text: str) -> str:
    """Write decimal integers as Python takes them: 07 becomes 7, outside strings."""

    def shorten(found: re.Match[str]) -> str:
        digits = (found["digits"] or "").replace("_", "")
        return str(int(digits)) if digits.startswith("0") and digits.strip("0") else found[0]

    return _INTEGER.sub(shorten, text)


def contains_broken_string_literal(text: str) -> bool:
    """Whether a string literal's first closing quote cannot be its end, since nothing that may follow one does."""
    return _broken_literal(text, at_end=True) is not None


def escape_nested_quotes_in_strings(text: str) -> tuple[str, bool]:
    """Escape quotes inside the first string literal that they break, where only one reading makes Python.

    Returns the text and whether it was changed: `f(c='sed -n '1p' x')` becomes `f(c='sed -n \\'1p\\' x')`.
    """
    start = _broken_literal(text, at_end=False)
    if start is None:
        return text, False
    quote, ends = text[start], []
    for found in re.finditer(rf"\\.|{text[start]}", text[start + 1 :], re.DOTALL):
        if found[0] == quote and _CLOSES_STRING.match(text, start + 1 + found.end()):
            ends.append(start + 1 + found.start())
    readings = []
    for end in ends:
        reading = f"{text[: start + 1]}{_escape_quotes(text[start + 1 : end], quote)}{text[end:]}"
        if _is_python(escape_ctrl_chars_in_strings(reading)):
            readings.append(reading)
    return (readings[0], True) if len(readings) == 1 else (text, False)


def _open_marks(text: str) -> tuple[list[str], str]:
    """The brackets that are open at the end, and the quote of the string that is."""
    brackets: list[str] = []
    for found in re.finditer(rf"{_STRING}|[\[\](){{}}]", text, re.DOTALL):
        mark = found[0]
        if found["quote"]:
            if not _is_closed(found):
                return brackets, found["quote"]
        elif mark in _CLOSING:
            brackets.append(mark)
        elif not brackets or _CLOSING[brackets.pop()] != mark:
            raise UnexpectedAstError(f"brackets do not match at {mark!r}, character {found.start()}")
    return brackets, ""


def _escape_quotes(text: str, quote: str) -> str:
    return re.sub(
        rf"\\.|{quote}", lambda found: found[0] if len(found[0]) > 1 else f"\\{quote}", text, flags=re.DOTALL
    )


def _is_closed(literal: re.Match[str]) -> bool:
    inner = re.sub(r"\\.", "", literal[0][1:], flags=re.DOTALL)
    return inner.endswith(literal["quote"])


def _is_last_entry_named(text: str, sign: str) -> bool:
    """Whether what the innermost open bracket holds ends in a value, or the beginning of one."""
    without_strings = re.sub(_STRING, "''", text, flags=re.DOTALL)
    entries = _CLOSED_BRACKETS.sub("", without_strings)
    while entries != (entries := _CLOSED_BRACKETS.sub("", entries)):
        pass
    inner = re.split(r"[\[({]", entries)[-1]
    last = inner.rsplit(",", 1)[-1]
    return sign in last or bool(inner and not last.strip())


def _broken_literal(text: str, *, at_end: bool) -> int | None:
    for found in _LITERAL.finditer(text):
        if not found["quote"]:
            continue
        if not _is_closed(found):
            return None
        if not _CLOSES_STRING.match(text, found.end()) and (at_end or text[found.end() :].strip()):
            return found.start()
    return None


def _is_python(text: str) -> bool:
    try:
        with _quiet():
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


@contextmanager
def _quiet() -> Generator[None]:
    """Without warnings about escapes, of whichever category they are in this Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
