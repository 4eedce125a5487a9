"""Nothing of a conversation vanishes: what a chat template does not write moves to where it does.

In this order, each only where the template needs it (TemplateTraits):

1. A developer's message becomes a system message, everywhere or after the first message.
2. Several calls in one message are told one after another, each with its result.
3. A message with text and calls becomes two; where even that does not help, such calls become text, and their
   results the user's.
4. Calls become text of their message, in the form that `write_call` gives them.
5. Results of tools become a user's message, `<tool_response>` around each; neighbouring ones share it.
6. Tools and documents that the template does not show are described at the end of the system message.
7. System messages open the next user's message: all of them, or those after the first.  (There are templates
   that lose the system message where the last message is a tool's: then, too.)

So a later rule sees what an earlier one has made.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from jaxserve.text.chat_messages import Turn, arguments_text, joined_contents, text_of
from jaxserve.text.template_traits import TemplateTraits
from jaxserve.text.tool_text import CallWriter, result_text

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


def fold(
    turns: Sequence[Turn], traits: TemplateTraits, write_call: CallWriter, described: Sequence[str] = ()
) -> list[Turn]:
    """The conversation as the template can write it; `described` goes into the system message."""
    folded: list[Turn] = list(turns)
    folded = [
        _with_role(turn, "system") if turn.role == "developer" and not _is_known(i, traits) else turn
        for i, turn in enumerate(folded)
    ]
    if traits.shows_tool_calls:
        if not traits.takes_parallel_calls:
            folded = _one_by_one(folded)
        if traits.call_form == "split":
            folded = [part for turn in folded for part in _calls_after_text(turn)]
        elif traits.call_form == "text":
            folded = _exchanges_as_text(folded, write_call)
        if not traits.takes_long_ids:
            folded = [_with_short_ids(turn) for turn in folded]
    else:
        folded = [_calls_as_text(turn, write_call) for turn in folded]
    if not traits.shows_tool_results:
        folded = _results_as_user(folded)
    if described:
        folded = _described(folded, described)
    keeps_first = traits.system.is_written and (
        traits.writes_system_before_results or folded[-1].role == "user"
    )
    if not (keeps_first and traits.writes_later_system):
        folded = _system_as_user(folded, keeps_first=keeps_first)
    return folded


def _is_known(place: int, traits: TemplateTraits) -> bool:
    return traits.knows_later_developer or (traits.knows_developer and place == 0)


def _with_role(turn: Turn, role: str) -> Turn:
    return Turn({**turn.message, "role": role}, turn.index)


def _with_content(turn: Turn, content: Any) -> Turn:
    return Turn({**turn.message, "content": content}, turn.index)


def _one_by_one(turns: Sequence[Turn]) -> list[Turn]:
    """Each call of a message in a message of its own, its result after it."""
    told: list[Turn] = []
    rest = list(reversed(turns))
    while rest:
        turn = rest.pop()
        calls = turn.message.get("tool_calls", ())
        if len(calls) < 2:
            told.append(turn)
            continue
        results: dict[Any, list[Turn]] = {}
        while rest and rest[-1].role == "tool":
            result = rest.pop()
            results.setdefault(result.message.get("tool_call_id"), []).append(result)
        for k, call in enumerate(calls):
            content = turn.message["content"] if k == 0 else ""
            told.append(Turn({**turn.message, "content": content, "tool_calls": [call]}, turn.index))
            told.extend(results.pop(call.get("id"), ()))
        told.extend(itertools.chain.from_iterable(results.values()))
    return told


def _calls_after_text(turn: Turn) -> list[Turn]:
    """A message with text and calls as two."""
    if "tool_calls" not in turn.message or not turn.message["content"]:
        return [turn]
    text = {key: value for key, value in turn.message.items() if key != "tool_calls"}
    return [Turn(text, turn.index), _with_content(turn, "")]


def _exchanges_as_text(turns: Sequence[Turn], write_call: CallWriter) -> list[Turn]:
    """Calls beside text become text, and their results the user's."""
    told: list[tuple[Turn, bool]] = []
    for turn in turns:
        if turn.role == "tool" and told and told[-1][1]:
            content = result_text(text_of(turn.message["content"]))
            told.append((Turn({"role": "user", "content": content}, turn.index), True))
            continue
        is_text = "tool_calls" in turn.message and bool(turn.message["content"])
        told.append((_calls_as_text(turn, write_call) if is_text else turn, is_text))
    return _joined_neighbours([(turn, is_made and turn.role == "user") for turn, is_made in told])


def _calls_as_text(turn: Turn, write_call: CallWriter) -> Turn:
    """A message's calls at the end of its text."""
    message = dict(turn.message)
    calls = message.pop("tool_calls", None)
    if calls is None:
        return turn
    written = "\n".join(write_call(call["function"]["name"], arguments_text(call)) for call in calls)
    content = message["content"]
    message["content"] = f"{text_of(content)}\n{written}" if content else written
    return Turn(message, turn.index)


def _with_short_ids(turn: Turn) -> Turn:
    message = turn.message
    if isinstance(message.get("tool_call_id"), str):
        message = {**message, "tool_call_id": _short_id(message["tool_call_id"])}
    if "tool_calls" in message:
        calls = [
            {**call, "id": _short_id(call["id"])} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
        message = {**message, "tool_calls": calls}
    return Turn(message, turn.index)


def _short_id(call_id: str) -> str:
    """Nine letters and digits, as Mistral's templates want them; the same ones for the same id."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _results_as_user(turns: Sequence[Turn]) -> list[Turn]:
    told: list[tuple[Turn, bool]] = []
    for is_result, group in itertools.groupby(turns, key=lambda turn: turn.role == "tool"):
        if not is_result:
            told.extend((turn, False) for turn in group)
            continue
        results = list(group)
        text = "\n".join(result_text(text_of(turn.message["content"])) for turn in results)
        told.append((Turn({"role": "user", "content": text}, results[0].index), True))
    return _joined_neighbours(told)


def _described(turns: list[Turn], described: Sequence[str]) -> list[Turn]:
    text = "\n\n".join(described)
    if turns and turns[0].role == "system":
        first = turns[0]
        return [_with_content(first, joined_contents(first.message["content"], text)), *turns[1:]]
    return [Turn({"role": "system", "content": text}, 0), *turns]


def _system_as_user(turns: Sequence[Turn], *, keeps_first: bool) -> list[Turn]:
    """System messages become the beginning of the next user's message, or one of their own."""
    rest = list(turns)
    told: list[tuple[Turn, bool]] = []
    if keeps_first and rest and rest[0].role == "system":
        first = rest.pop(0)
        while rest and rest[0].role == "system":
            first = _with_content(
                first, joined_contents(first.message["content"], rest.pop(0).message["content"])
            )
        told.append((first, False))
    told.extend((_with_role(turn, "user"), True) if turn.role == "system" else (turn, False) for turn in rest)
    return _joined_neighbours(told)


def _joined_neighbours(turns: Sequence[tuple[Turn, bool]]) -> list[Turn]:
    """User's messages of our own making (marked True) join their neighbours: many templates want turns to alternate."""
    joined: list[tuple[Turn, bool]] = []
    for turn, is_made in turns:
        if joined and turn.role == "user" == joined[-1][0].role and (is_made or joined[-1][1]):
            before, _ = joined.pop()
            content = joined_contents(before.message["content"], turn.message["content"])
            turn = Turn({**before.message, "content": content}, turn.index)
        joined.append((turn, is_made))
    return [turn for turn, _ in joined]
