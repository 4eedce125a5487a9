"""Chat templates of our own, under the names that vLLM's documentation uses for its."""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePath

_PREFIX, _SUFFIX = "tool_chat_template_", ".jinja"


def template_names() -> list[str]:
    """The names of all templates, as files: tool_chat_template_hermes.jinja and so on."""
    return sorted(entry.name for entry in files(__name__).iterdir() if entry.name.endswith(_SUFFIX))


def named_template(name: str) -> str | None:
    """The source of a template by its name, or None.

    A name may be a path, of which the last part counts (examples/tool_chat_template_hermes.jinja), and may leave out
    what all names share (hermes).
    """
    last = PurePath(name).name
    for candidate in (last, f"{last}{_SUFFIX}", f"{_PREFIX}{last}{_SUFFIX}"):
        if candidate in template_names():
            return (files(__name__) / candidate).read_text(encoding="utf-8")
    return None
