#!/bin/sh
# The tables of one H100, each beside vLLM's figures: `benchmarks/h100.sh --help` lists the parts.
# Needs jax, flax, transformers, safetensors, tokenizers and numpy; no server packages and no network.
cd "$(dirname "$0")/.." || exit
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 exec "${PYTHON:-python3}" -m benchmarks.h100 "$@"
