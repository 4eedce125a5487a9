"""Structural tags (free text in which tags begin constrained parts) as Lark.

The formats are those of xgrammar's documentation, as OpenAI-style requests carry them; vLLM's older shape is read too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.errors import RequestError
from jaxserve.structured.lark import (
    ANY_TEXT,
    lark_literal,
    lark_regex,
    lark_text,
    lark_token,
    split_text,
)
from jaxserve.structured.limits import check_regex

if TYPE_CHECKING:
    from jaxserve.text.tokenizer import Tokenizer

Format = Mapping[str, Any]
_MAX_DEPTH = 40  # of formats in formats


def structural_tag_grammars(
    tag: Mapping[str, Any],
    tokenizer: Tokenizer,
    end_token_ids: Iterable[int],
    schema_text: Callable[[Mapping[str, Any] | bool], str],
    lark: Callable[[str], str],
) -> list[dict[str, str]]:
    """Grammars of which the first is the whole.  Raises RequestError naming the part that is at fault.

    `schema_text` writes a JSON schema as Lark, `lark` reads a grammar in whatever dialect.
    """
    if "format" in tag:
        format_, where = tag["format"], "structural_tag.format"
    elif "structures" in tag or "triggers" in tag:
        format_, where = _from_structures(tag), "structural_tag"
    else:
        raise RequestError("structural_tag must have a format, or structures and triggers.")
    writer = _Writer(tokenizer, end_token_ids, schema_text, lark)
    writer.rules.insert(0, f"start: {writer.expression(format_, where)}")
    return [{"lark_grammar": "\n".join(writer.rules)}, *writer.grammars]


def _from_structures(tag: Mapping[str, Any]) -> Format:
    tags = []
    for index, item in enumerate(_list(tag, "structures", "structural_tag")):
        where = f"structural_tag.structures[{index}]"
        if not isinstance(item, Mapping):
            raise RequestError(f"{where} must be an object, got {item!r:.60}.")
        content = {"type": "json_schema", "json_schema": _field(item, "schema", where)}
        tags.append(
            {"type": "tag", "begin": item.get("begin"), "content": content, "end": item.get("end", "")}
        )
    return {"type": "triggered_tags", "triggers": _list(tag, "triggers", "structural_tag"), "tags": tags}


class _Writer:
    """Turns formats into Lark expressions, collecting rules and named grammars on the way.

    Free text ends where the tag around it does: `ends` are the strings that end it, which it must not swallow.  An
    expression for free text with `ends` matches its end, too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_token_ids: Iterable[int],
        schema_text: Callable[[Mapping[str, Any] | bool], str],
        lark: Callable[[str], str],
    ) -> None:
        self._end_token_ids = set(end_token_ids)
        self.rules: list[str] = []
        self.grammars: list[dict[str, str]] = []
        self._tokenizer = tokenizer
        self._schema_text = schema_text
        self._lark = lark
        self._names: dict[tuple[str, bool], str] = {}  # of rules for free text, by terminal and laziness
        self._depth = 0
        self._formats: dict[str, Callable[[Format, str], str]] = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "grammar": self._grammar,
            "regex": self._regex,
            "sequence": self._sequence,
            "or": self._or,
            "optional": lambda f, where: self._repeated(f, where, "?"),
            "plus": lambda f, where: self._repeated(f, where, "+"),
            "star": lambda f, where: self._repeated(f, where, "*"),
            "repeat": self._repeat,
            "tag": self._tag,
            "tags_with_separator": self._tags_with_separator,
            "token": self._token,
            "exclude_token": lambda f, where: self._other_tokens(f, where),
            "any_tokens": lambda f, where: f"{self._other_tokens(f, where)}*",
            "token_triggered_tags": self._token_triggered_tags,
        }

    def expression(self, format_: Any, where: str, ends: Sequence[str] = ()) -> str:
        """What matches a format; with `ends`, of which one must follow, what matches it and its end."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise RequestError(f"{where} is nested more than {_MAX_DEPTH} deep.")
        if not isinstance(format_, Mapping):
            raise RequestError(f"{where} must be an object with a type, got {format_!r:.60}.")
        kind = format_.get("type")
        if kind == "any_text":
            text = self._any_text(format_, where, ends)
        elif kind == "triggered_tags":
            text = self._triggered_tags(format_, where, ends)
        elif kind == "sequence" and ends:
            text = self._sequence(format_, where, ends)
        elif isinstance(kind, str) and kind in self._formats:
            text = self._formats[kind](format_, where)
            if ends:
                text = f"{text} {self._one_of(ends)}"
        else:
            known = ", ".join(sorted([*self._formats, "any_text", "triggered_tags"]))
            raise RequestError(f"{where}.type {kind!r:.60} is not supported; supported are {known}.")
        self._depth -= 1
        return text

    # ------------------------------------------------------------------ text

    def _const_string(self, format_: Format, where: str) -> str:
        return lark_text(self._tokenizer, _string(format_, "value", where))

    def _json_schema(self, format_: Format, where: str) -> str:
        style = format_.get("style", "json")
        if style != "json":
            raise RequestError(f"{where}.style {style!r:.60} is not supported; only 'json' is.")
        if format_.get("any_order"):
            raise RequestError(f"{where}.any_order is not supported: properties come in the schema's order.")
        schema = _field(format_, "json_schema", where)
        if not isinstance(schema, Mapping | bool):
            raise RequestError(f"{where}.json_schema must be an object or a boolean, got {schema!r:.60}.")
        return self._schema_text(schema)

    def _grammar(self, format_: Format, where: str) -> str:
        name = f"part_{len(self.grammars)}"
        self.grammars.append({"name": name, "lark_grammar": self._lark(_string(format_, "grammar", where))})
        return f"@{name}"

    def _regex(self, format_: Format, where: str) -> str:
        pattern = _string(format_, "pattern", where)
        check_regex(pattern)
        return lark_regex(pattern) if pattern else '""'

    def _any_text(self, format_: Format, where: str, ends: Sequence[str]) -> str:
        if format_.get("max_tokens") is not None:
            raise RequestError(f"{where}.max_tokens is not supported; max_chars is.")
        text = self._text_terminal(format_, where)
        return self._rule(text) if not ends else self._up_to(text, ends)

    def _text_terminal(self, format_: Format, where: str) -> str:
        """A regular expression for free text, without the strings that it must not contain."""
        excludes = _strings(format_, "excludes", where) if format_.get("excludes") else []
        limit = format_.get("max_chars")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise RequestError(f"{where}.max_chars must be an integer of at least 0, got {limit!r:.60}.")
        text = ANY_TEXT if limit is None else rf"/(.|\n){{0,{limit}}}/"
        if excludes:
            text = f"({text} & ~({ANY_TEXT} ({self._either(excludes)}) {ANY_TEXT}))"
        return text

    def _up_to(self, text: str, ends: Sequence[str]) -> str:
        """Free text up to and including one of `ends`."""
        plain = [
            end for end in ends if all(isinstance(part, str) for part in split_text(self._tokenizer, end))
        ]
        choices = []
        if plain:
            # Lazy: it stops at the first end that is written.
            choices.append(self._rule(f"{text} ({self._either(plain)})", lazy=True))
        for end in ends:
            if end not in plain:
                # A control token is no text, so the text before it may hold what comes before it in the end.
                parts = split_text(self._tokenizer, end)
                first = next(index for index, part in enumerate(parts) if isinstance(part, int))
                rest = [lark_token(p) if isinstance(p, int) else lark_literal(p) for p in parts[first:]]
                choices.append(f"{self._rule(text)} {' '.join(rest)}")
        return f"({' | '.join(choices)})"

    # ------------------------------------------------------------------ compositions

    def _sequence(self, format_: Format, where: str, ends: Sequence[str] = ()) -> str:
        elements = _list(format_, "elements", where)
        parts = []
        begun = ""  # what the free text before an element has matched of it
        for index, element in enumerate(elements):
            here = f"{where}.elements[{index}]"
            if index == len(elements) - 1:
                following, until = "", ends
            else:  # free text before a fixed string ends there, and does not swallow it
                following = _beginning(elements[index + 1]) if _is_free_text(element) else ""
                until = [following] if following else ()
            if not begun:
                parts.append(self.expression(element, here, until))
            elif element["type"] == "tag":
                parts.append(self._tag_after(element, here, begun))
                parts += [self._one_of(until)] if until else []
            else:
                parts += [self._one_of(until)] if until else []
            begun = following
        return f"({' '.join(parts)})"

    def _or(self, format_: Format, where: str) -> str:
        parts = [
            self.expression(element, f"{where}.elements[{index}]")
            for index, element in enumerate(_list(format_, "elements", where))
        ]
        return f"({' | '.join(parts)})"

    def _repeated(self, format_: Format, where: str, operator: str) -> str:
        content = self.expression(_field(format_, "content", where), f"{where}.content")
        return f"({content}){operator}"

    def _repeat(self, format_: Format, where: str) -> str:
        content = self.expression(_field(format_, "content", where), f"{where}.content")
        least, most = _field(format_, "min", where), _field(format_, "max", where)
        are_ints = all(isinstance(n, int) and not isinstance(n, bool) for n in (least, most))
        if not are_ints or not (0 <= least <= 2**31 - 2 and (most == -1 or least <= most <= 2**31 - 2)):
            raise RequestError(
                f"{where} must have min of at least 0 and max of at least min, or -1; got {least!r}, {most!r}."
            )
        if most == 0:
            return '""'
        return f"({content}){{{least},{'' if most == -1 else most}}}"

    # ------------------------------------------------------------------ tags

    def _tag(self, format_: Format, where: str) -> str:
        return self._tag_after(format_, where, "")

    def _tag_after(self, format_: Format, where: str, trigger: str) -> str:
        """A tag without the beginning that a trigger has matched."""
        begin, end = _field(format_, "begin", where), _field(format_, "end", where)
        if isinstance(begin, str):
            rest = begin[len(trigger) :]
            head = lark_text(self._tokenizer, rest) + " " if rest else ""
        else:
            head = self._token(begin, f"{where}.begin") + " "
        content = _field(format_, "content", where)
        if isinstance(end, Mapping):
            body = self.expression(content, f"{where}.content")
            return f"({head}{body} {self._token(end, f'{where}.end')})"
        ends = [end] if isinstance(end, str) else end
        if not isinstance(ends, list | tuple) or not all(isinstance(item, str) for item in ends) or not ends:
            raise RequestError(
                f"{where}.end must be a string, a list of strings or a token, got {end!r:.60}."
            )
        if "" in ends:
            body = self.expression(content, f"{where}.content")
            return f"({head}{body} {self._one_of(ends)})"
        return f"({head}{self.expression(content, f'{where}.content', ends)})"

    def _triggered_tags(self, format_: Format, where: str, ends: Sequence[str]) -> str:
        triggers = _strings(format_, "triggers", where)
        tags = _list(format_, "tags", where)
        text = self._text_terminal({"excludes": format_.get("excludes")}, where)
        whole, segments = [], []
        by_trigger: dict[str, list[str]] = {}
        for index, tag in enumerate(tags):
            here = f"{where}.tags[{index}]"
            begin = tag.get("begin") if isinstance(tag, Mapping) else None
            if not isinstance(begin, str):
                raise RequestError(f"{here} must be a tag whose begin is a string.")
            matching = [trigger for trigger in triggers if begin.startswith(trigger)]
            if len(matching) != 1:
                raise RequestError(
                    f"{here}.begin {begin!r:.60} must begin with exactly one of the triggers, and does with "
                    f"{len(matching)}."
                )
            by_trigger.setdefault(matching[0], []).append(self._tag_after(tag, here, matching[0]))
            whole.append(self._tag_after(tag, here, ""))
        for trigger, rests in by_trigger.items():
            segments.append(f"{self._up_to(text, [trigger])} ({' | '.join(rests)})")
        return self._free_text_with(segments, whole, format_, lambda: self._tail(text, ends), ends)

    def _tail(self, text: str, ends: Sequence[str]) -> str:
        return self._up_to(text, ends) if ends else self._rule(text)

    def _token_triggered_tags(self, format_: Format, where: str) -> str:
        triggers = [
            self._token_id(t, f"{where}.trigger_tokens") for t in _list(format_, "trigger_tokens", where)
        ]
        excluded = self._excluded_ids(format_, where)
        tags = _list(format_, "tags", where)
        for index, tag in enumerate(tags):
            begin = tag.get("begin") if isinstance(tag, Mapping) else None
            if not isinstance(begin, Mapping) or self._token_id(begin.get("token"), where) not in triggers:
                raise RequestError(f"{where}.tags[{index}].begin must be a token among the trigger tokens.")
        whole = [self._tag_after(tag, f"{where}.tags[{index}]", "") for index, tag in enumerate(tags)]
        free = f"{_none_of({*triggers, *excluded})}*"
        return self._free_text_with([f"{free} ({' | '.join(whole)})"], whole, format_, lambda: free, ())

    def _free_text_with(
        self,
        segments: Sequence[str],
        whole: Sequence[str],
        format_: Format,
        tail: Callable[[], str],
        ends: Sequence[str],
    ) -> str:
        """Free text with tags in it.  A segment is text and a tag; `tail` writes the text after the last one."""
        at_least_one, stops = bool(format_.get("at_least_one")), bool(format_.get("stop_after_first"))
        segment, first = f"({' | '.join(segments)})", f"({' | '.join(whole)})"
        after_stop = f" {self._one_of(ends)}" if ends else ""
        if at_least_one and stops:
            return f"{first}{after_stop}"
        if at_least_one:
            return f"({first} {segment}* {tail()})"
        if stops:
            return f"({segment}{after_stop} | {tail()})"
        return f"({segment}* {tail()})"

    def _tags_with_separator(self, format_: Format, where: str) -> str:
        tags = [
            self._tag(tag if isinstance(tag, Mapping) else {}, f"{where}.tags[{index}]")
            for index, tag in enumerate(_list(format_, "tags", where))
        ]
        tag = f"({' | '.join(tags)})"
        separator = _string(format_, "separator", where)
        several = tag
        if not format_.get("stop_after_first"):
            between = f"{lark_text(self._tokenizer, separator)} " if separator else ""
            several = f"({tag} ({between}{tag})*)"
        return several if format_.get("at_least_one") else f"({several})?"

    # ------------------------------------------------------------------ tokens

    def _token(self, format_: Format, where: str) -> str:
        if not isinstance(format_, Mapping) or "token" not in format_:
            raise RequestError(f"{where} must be a string or a token, got {format_!r:.60}.")
        return lark_token(self._token_id(format_["token"], where))

    def _other_tokens(self, format_: Format, where: str) -> str:
        if format_.get("max_tokens") is not None:
            raise RequestError(f"{where}.max_tokens is not supported.")
        return _none_of(self._excluded_ids(format_, where))

    def _excluded_ids(self, format_: Format, where: str) -> set[int]:
        """The tokens that a format excludes, and the end tokens: those end the answer, and are no part of it."""
        excluded = format_.get("exclude_tokens") or ()
        if not isinstance(excluded, list | tuple):
            raise RequestError(f"{where}.exclude_tokens must be a list, got {excluded!r:.60}.")
        return {*self._end_token_ids, *(self._token_id(t, f"{where}.exclude_tokens") for t in excluded)}

    def _token_id(self, token: object, where: str) -> int:
        if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
            return token
        token_id = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise RequestError(f"{where}: {token!r:.60} is no token of this model.")
        return token_id

    # ------------------------------------------------------------------ rules

    def _rule(self, terminal: str, *, lazy: bool = False) -> str:
        """A rule for a terminal, written once."""
        name = self._names.get((terminal, lazy))
        if name is None:
            name = self._names[terminal, lazy] = f"text_{len(self._names)}"
            # The terminal has a name of its own, for only there may it have `&` and `~`.
            self.rules += [f"{name}{'[lazy]' if lazy else ''}: {name.upper()}", f"{name.upper()}: {terminal}"]
        return name

    def _one_of(self, texts: Sequence[str]) -> str:
        return f"({' | '.join(lark_text(self._tokenizer, text) for text in texts)})"

    def _either(self, texts: Sequence[str]) -> str:
        """The same, inside a terminal."""
        return " | ".join(map(lark_literal, texts))


def _is_free_text(format_: object) -> bool:
    return isinstance(format_, Mapping) and format_.get("type") in ("any_text", "triggered_tags")


def _beginning(format_: object) -> str:
    """The fixed string that a format begins with; empty if it has none."""
    if not isinstance(format_, Mapping):
        return ""
    value = {"const_string": format_.get("value"), "tag": format_.get("begin")}.get(str(format_.get("type")))
    return value if isinstance(value, str) else ""


def _none_of(token_ids: Iterable[int]) -> str:
    return f"<[^{','.join(map(str, sorted(token_ids)))}]>"


def _field(format_: Format, name: str, where: str) -> Any:
    if name not in format_:
        raise RequestError(f"{where}.{name} is missing.")
    return format_[name]


def _string(format_: Format, name: str, where: str) -> str:
    value = _field(format_, name, where)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string, got {value!r:.60}.")
    return value


def _list(format_: Format, name: str, where: str) -> Sequence[Any]:
    value = _field(format_, name, where)
    if not isinstance(value, list | tuple) or not value:
        raise RequestError(f"{where}.{name} must be a list that is not empty, got {value!r:.60}.")
    return value


def _strings(format_: Format, name: str, where: str) -> Sequence[str]:
    value = _list(format_, name, where)
    if not all(isinstance(item, str) and item for item in value):
        raise RequestError(f"{where}.{name} must be a list of strings that are not empty.")
    return value
