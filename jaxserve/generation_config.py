"""Where sampling defaults come from: the model, nowhere, or a generation_config.json of the operator's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxserve.errors import CheckpointError, ConfigError, RequestError
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.loading.fields import Fields
from jaxserve.loading.hf_config import SAMPLING_KEYS, sampling_from_hf
from jaxserve.loading.hub import download_from_hub, is_hub_name
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig

FILE = "generation_config.json"

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def generation_defaults(config: EngineConfig, model: GenerationDefaults) -> GenerationDefaults:
    """The defaults of an engine: `model`'s own as generation_config and override_generation_config change them.

    As in vLLM: "auto" keeps the model's, "vllm" keeps only its end tokens, anything else is a directory (or hub
    name) whose generation_config.json counts instead; the override replaces single values.  A max_new_tokens of
    the operator's, from that directory or from the override, also limits what requests may ask of a server.

    Raises ConfigError for a file that is not there and for values that cannot be.
    """
    defaults, where, limit = model, FILE, None
    if config.generation_config == "vllm":
        defaults = replace(model, sampling={})
    elif config.generation_config != "auto":
        where = f"generation_config={config.generation_config!r}"
        fields = Fields(_read(config.generation_config), where)
        eos, sampling = _refusing(fields.token_ids, "eos_token_id"), _refusing(sampling_from_hf, fields)
        defaults = GenerationDefaults(eos or model.eos_token_ids, sampling)
        limit = sampling.get("max_tokens")
    _check(defaults.sampling, where)
    override = _override(config.override_generation_config)
    limit = override.get("max_tokens", limit)
    return replace(defaults, sampling={**defaults.sampling, **override}, max_tokens_limit=limit)


def _override(values: Mapping[str, Any]) -> dict[str, Any]:
    where = "override_generation_config"
    unknown = [name for name in values if name not in SAMPLING_KEYS]
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]!r} has no effect here; there are {', '.join(SAMPLING_KEYS)}")
    sampling = _refusing(sampling_from_hf, Fields(values, where))
    _check(sampling, where)
    return sampling


def _check(sampling: Mapping[str, Any], where: str) -> None:
    """Refuse at start what would otherwise make every silent request fail."""
    try:
        SamplingParams(**sampling)
    except RequestError as error:
        hint = "; generation_config=vllm does without the model's file" if where == FILE else ""
        raise ConfigError(f"{where}: {error}{hint}") from error


def _refusing(read: Callable[[Argument], Result], argument: Argument) -> Result:
    """`read(argument)`, whose CheckpointError is about a setting here, not about the checkpoint."""
    try:
        return read(argument)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _read(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if not path.exists() and is_hub_name(source):
        path = download_from_hub(source, with_weights=False)
    if path.is_dir():
        path = path / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"generation_config={source!r}: {path}: {error.strerror}; give auto, vllm, or a directory with a {FILE}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"generation_config={source!r}: {path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"generation_config={source!r}: {path} holds no JSON object")
    return content
