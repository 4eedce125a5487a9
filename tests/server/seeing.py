"""A server whose model takes images, and how it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxserve.engine.protocol import CoreRequest
from tests.server.serving import Serving, serving
from tests.tiny import byte_tokenizer
from tests.vision import TEMPLATE, TOKENS, picture, user, vision_info

RED, BLUE = picture(2, 3), picture(4, 1, "blue")


@contextmanager
def seeing(info: dict[str, Any] | None = None, **options: Any) -> Iterator[Serving]:
    """A server whose model takes images."""
    given: dict[str, Any] = {"chat_template": TEMPLATE, "special_tokens": TOKENS, **options}
    with serving(info=vision_info(**(info or {})), **given) as served:
        yield served


def prompt_of(request: CoreRequest) -> str:
    return byte_tokenizer(special=TOKENS).decode(request.prompt_token_ids, skip_special_tokens=False)


async def refused(served: Serving, *parts: Any, **fields: Any) -> str:
    answered = await served.chat(messages=[user(*parts)], **fields)
    assert answered.status == 400, answered.data
    assert served.engine.submitted == []
    assert answered.error["type"] == "BadRequestError"
    return f"{answered.error['param']}: {answered.error['message']}"


async def refused_next(served: Serving, *parts: Any, **fields: Any) -> str:
    served.engine.submitted.clear()
    return await refused(served, *parts, **fields)
