"""EngineConfig from the keyword arguments of LLM(…), in our names or in vLLM's."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.vllm_options import engine_keyword

_log = logging.getLogger(__name__)

# Of options that we have.
_VLLM_NAMES = {"block_size": "page_size", "kv_cache_memory_bytes": "kv_cache_memory"}


def engine_config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from keyword options, in its own names or vLLM's; None means what it is by default.

    Logs those of vLLM's that change nothing.  Raises ConfigError for those that cannot be, and for an unknown one.
    """
    known = [f.name for f in dataclasses.fields(EngineConfig) if f.name != "model"]
    chosen = {}
    for name, value in options.items():
        own = _VLLM_NAMES.get(name, name)
        if own not in known:
            _see_foreign(name, value, known)
        elif value is not None:
            chosen[own] = value
    return EngineConfig(model=model, **chosen)


def _see_foreign(name: str, value: object, known: Sequence[str]) -> None:
    option = engine_keyword(name)
    said = f"{name}={value!r}"
    if option is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"{said}: unknown engine option; {hint}")
    if option.asks_for_nothing(value) or (value is False and not option.is_needless):
        return
    sentence = option.keyword_sentence(said)
    if not option.is_needless:
        raise ConfigError(sentence)
    _log.warning("%s", sentence)
