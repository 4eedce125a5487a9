"""Turns the blocks of a GGUF tensor into floats."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_blocks

# Weights at a time: the temporaries then stay in the L2 cache (1.5 to 2.5 times faster than whole tensors),
# while a numpy call is still long enough, with the GIL released, for other threads to run.
_CHUNK_WEIGHTS = 128 * 1024

_PLAIN = {  # stored as floats already: given back as they are
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Whether `dequantize` knows this block type (asked of the gguf package by a block of zeros)."""
    if kind in _PLAIN:
        return True
    try:
        dequantize_blocks(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def dequantize(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks, uint8 [bytes], as floats [weights]: a view if they are stored as floats, else float32.

    The numbers are those of gguf.quants.dequantize.
    """
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind])
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    num_blocks = raw.size // block_bytes
    step = max(1, _CHUNK_WEIGHTS // block_size)
    out = np.empty(num_blocks * block_size, np.float32)
    for first in range(0, num_blocks, step):
        last = min(first + step, num_blocks)
        # As one row: gguf.quants works on 16 rows at a time, for usual widths far too little to be fast.
        row = raw[None, first * block_bytes : last * block_bytes]
        out[first * block_size : last * block_size] = dequantize_blocks(row, kind)[0]
    return out
