"""jaxserve: an LLM inference server in JAX.  `from jaxserve import LLM, SamplingParams, AsyncLLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

if TYPE_CHECKING:
    from jaxserve.async_llm import AsyncLLM
    from jaxserve.inputs import TextPrompt, TokensPrompt
    from jaxserve.llm import LLM
    from jaxserve.outputs import CompletionOutput, RequestOutput
    from jaxserve.sampling_params import SamplingParams
    from jaxserve.structured_outputs import StructuredOutputsParams

_HOMES = {
    "LLM": "jaxserve.llm",
    "AsyncLLM": "jaxserve.async_llm",
    "CompletionOutput": "jaxserve.outputs",
    "RequestOutput": "jaxserve.outputs",
    "SamplingParams": "jaxserve.sampling_params",
    "StructuredOutputsParams": "jaxserve.structured_outputs",
    "TextPrompt": "jaxserve.inputs",
    "TokensPrompt": "jaxserve.inputs",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import jaxserve` alone must not pay for jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
