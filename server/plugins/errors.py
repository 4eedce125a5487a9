"""What becomes of an error in a plug-in: it fails the one request whose answer the plug-in was reading."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from jaxserve.errors import RequestError, RequestFailedError
from jaxserve.server.plugins.finder import PLUGIN_MODULES

_log = logging.getLogger(__name__)


@contextmanager
def plugin_errors(parser: object) -> Generator[None]:
    """Plug-in code runs in here.

    Raises RequestFailedError for what it raises, but for RequestError, by which it refuses a request.
    """
    try:
        with PLUGIN_MODULES.finding():  # for what it may import by importlib's functions
            yield
    except RequestError:
        raise
    except Exception as error:
        cls = parser if isinstance(parser, type) else type(parser)
        name = f"{cls.__module__}.{cls.__qualname__}"
        _log.exception("the plug-in %s failed", name)
        raise RequestFailedError(
            f"the plug-in {name} failed on this answer: {type(error).__name__}: {error}"
        ) from error
