"""A library that looks whether vLLM is there."""

import importlib.util

HAS_VLLM = importlib.util.find_spec("vllm") is not None
