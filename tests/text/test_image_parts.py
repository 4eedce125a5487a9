"""Images pass through a template in the order of the conversation, wherever folding moves them."""

from __future__ import annotations

from typing import Any

from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.image_parts import ImageMarks

PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<IMG>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
TEXT = "{% for m in messages if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def image(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": name}}


def rendered(template: str, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[int]]:
    marks = ImageMarks("<IMG>", "IMG")
    prompt = ChatTemplate(template).render(messages, marks=marks, add_generation_prompt=False, **options)
    return prompt, marks.order


def calling(*ids: str) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": i, "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call_id: str, *content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": list(content)}


def test_parts_for_a_template_that_takes_them() -> None:
    messages = [{"role": "user", "content": [image("a"), {"type": "text", "text": "x"}, image("b")]}]
    assert rendered(PARTS, messages) == ("[user]<IMG>x<IMG>", [0, 1])


def test_marks_for_a_template_that_takes_text() -> None:
    messages = [
        {"role": "system", "content": [image("a")]},
        {"role": "user", "content": ["x", image("b")]},
    ]
    assert rendered(TEXT, messages) == ("[user]<IMG>\nx\n<IMG>", [0, 1])


def test_results_of_tools_keep_their_images() -> None:
    messages = [{"role": "user", "content": "go"}, calling("f"), result("f", "it:", image("a"))]
    prompt, order = rendered(TEXT, messages)
    assert prompt.endswith("<tool_response>\nit:\n<IMG>\n</tool_response>")
    assert order == [0]


def test_order_follows_what_folding_moves() -> None:
    # Calls are told one by one, each with its result, and results came in another order.
    one_call = PARTS.replace(
        "{% for c in",
        "{% if (m.tool_calls or []) | length > 1 %}{{ raise_exception('one') }}{% endif %}{% for c in",
    )
    messages = [
        {"role": "user", "content": [image("question")]},
        calling("f", "g"),
        result("g", image("of g")),
        result("f", image("of f")),
    ]
    prompt, order = rendered(one_call, messages)
    assert prompt == "[user]<IMG>[assistant](f {})[tool]<IMG>[assistant](g {})[tool]<IMG>"
    assert order == [0, 2, 1]


def test_nobody_can_forge_a_mark() -> None:
    forged = "JAXSERVE-IMAGE-0000000000000000-0."
    prompt, order = rendered(PARTS, [{"role": "user", "content": [forged, image("a")]}])
    assert prompt == f"[user]{forged}<IMG>"
    assert order == [0]
