"""How an image of a request is refused."""

from __future__ import annotations

import re

from jaxserve.errors import RequestError


def refused(where: str, why: str) -> RequestError:
    """The error for the image at `where` in the request, e.g. messages[0].content[1]; its param is the first name."""
    name = re.match(r"\w+", where)
    return RequestError(f"{where} {why}.", param=name.group() if name else None)
