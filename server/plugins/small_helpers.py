"""What parsers import from vLLM beside its parser modules: a logger, ids, checks."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import MutableMapping
from types import ModuleType
from typing import Any

from jaxserve.errors import RequestError


class PluginLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger with vLLM's methods that say a thing once.  Whatever the scope, there is one process."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})
        self._said: set[tuple[int, str, tuple[object, ...]]] = set()

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave everything as it is."""
        return msg, kwargs

    def debug_once(self, msg: str, *args: Any, scope: str = "process") -> None:
        """`debug`, the first time."""
        self._once(logging.DEBUG, msg, args)

    def info_once(self, msg: str, *args: Any, scope: str = "process") -> None:
        """`info`, the first time."""
        self._once(logging.INFO, msg, args)

    def warning_once(self, msg: str, *args: Any, scope: str = "process") -> None:
        """`warning`, the first time."""
        self._once(logging.WARNING, msg, args)

    def _once(self, level: int, msg: str, args: tuple[object, ...]) -> None:
        said = (level, msg, tuple(map(str, args)))
        if said not in self._said:
            self._said.add(said)
            self.log(level, msg, *args, stacklevel=3)


class VLLMValidationError(RequestError, ValueError):
    """A parser refuses a request: the client gets a 400."""

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message, param=parameter)
        self.parameter = parameter
        self.value = value


def init_logger(name: str) -> PluginLogger:
    """The logger of a plug-in: what it says appears among the server's own lines."""
    return PluginLogger(logging.getLogger(f"jaxserve.plugins.{name}"))


def is_list_of(value: object, typ: type | tuple[type, ...], *, check: str = "first") -> bool:
    """Whether a value is a list whose first item (check="all": each item) is of a type."""
    items = value if isinstance(value, list) else None
    return items is not None and all(
        isinstance(each, typ) for each in (items if check == "all" else items[:1])
    )


def is_mistral_tokenizer(obj: object) -> bool:
    """Never: Mistral models are served through `tokenizers` here."""
    return False


def import_from_path(module_name: str, file_path: str | os.PathLike[str]) -> ModuleType:
    """Import a file under a name.  Raises ModuleNotFoundError if it is no Python file."""
    spec = importlib.util.spec_from_file_location(module_name, file_path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{os.fspath(file_path)} is no Python file", name=module_name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def tool_parse_regex_timeout() -> int:
    """Seconds that a parser gives its regular expressions."""
    return int(os.environ.get("VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS", "1"))


def enforce_strict_tool_calling() -> bool:
    """Whether vLLM's structural tags are wanted."""
    return os.environ.get("VLLM_ENFORCE_STRICT_TOOL_CALLING", "true").lower() in ("true", "1")
