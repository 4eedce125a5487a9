#!/bin/sh
# One model over several H100s of one host, beside vLLM's figures: `benchmarks/h100_tp.sh --help` lists the options.
# Needs what benchmarks/h100.sh needs, and NVLink between the GPUs for its figures to mean what the peer's do.
cd "$(dirname "$0")/.." || exit
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 exec "${PYTHON:-python3}" -m benchmarks.h100.tensor_parallel "$@"
