"""Block sizes of the GPU decode kernel: a rule, and above it what was measured.

`benchmarks/tune_decode.py` measures, and rewrites the rows between the two markers.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.kernels_pallas.powers_of_two import power_of_two_below

_STAGE_BYTES = (
    32 * 1024
)  # keys and values that a pipeline stage holds; three stages leave room for two programs
_PROGRAMS_WANTED = 512  # about four for each of an H100's 132 multiprocessors
_MAX_SPLITS = 64
_FARTHEST = 4  # times as many programs, or as few, for which a measured row still counts
_FALLBACK_DEVICE = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How the decode kernel cuts its work."""

    block_kv: int  # cached tokens that a loop iteration reads; a power of two, 16 at least
    num_splits: int  # programs that may share a row's tokens; a power of two
    split_tokens: int  # a row gets one more of them for each so many tokens
    num_warps: int
    num_stages: int  # depth of the software pipeline


# (device kind, head_dim, query heads per kv head, dtype of the pages, rows x kv heads)
_Key = tuple[str, int, int, str, int]

# fmt: off
# measured rows begin
_MEASURED: dict[_Key, DecodeTuning] = {
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 8): DecodeTuning(64, 64, 64, 4, 2),
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 16): DecodeTuning(64, 64, 64, 4, 3),
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 32): DecodeTuning(32, 16, 64, 2, 4),
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 64): DecodeTuning(64, 16, 64, 2, 2),
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 128): DecodeTuning(128, 8, 256, 4, 2),
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 256): DecodeTuning(128, 4, 1024, 4, 2),
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 512): DecodeTuning(128, 4, 1024, 4, 3),
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 1024): DecodeTuning(128, 4, 1024, 4, 3),
    ("NVIDIA H100 80GB HBM3", 64, 4, "bfloat16", 2048): DecodeTuning(128, 4, 1024, 4, 3),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 8): DecodeTuning(64, 64, 64, 4, 4),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 16): DecodeTuning(64, 64, 64, 2, 3),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 32): DecodeTuning(64, 32, 64, 4, 2),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 64): DecodeTuning(64, 16, 128, 2, 2),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 128): DecodeTuning(64, 8, 1024, 2, 3),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 256): DecodeTuning(64, 4, 1024, 2, 2),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 512): DecodeTuning(64, 4, 1024, 4, 3),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 1024): DecodeTuning(64, 4, 1024, 4, 3),
    ("NVIDIA H100 80GB HBM3", 128, 4, "bfloat16", 2048): DecodeTuning(64, 4, 1024, 4, 3),
}
# measured rows end
# fmt: on


def decode_tuning(
    device_kind: str, *, head_dim: int, group: int, dtype: str, itemsize: int, num_programs: int
) -> DecodeTuning:
    """The measured row nearest in `num_programs` (rows x kv heads, before splitting), or what the rule says.

    What is best for 8 programs cuts the rows of 2048 into far too many splits: three times the time (heads of 64,
    H100, jax 0.11.2, 2026-11-25).
    """
    known = any(key[0] == device_kind for key in _MEASURED)
    wanted = (device_kind if known else _FALLBACK_DEVICE, head_dim, group, dtype)
    rows = [key for key in _MEASURED if key[:4] == wanted]
    if not rows:
        return decode_rule(head_dim=head_dim, itemsize=itemsize, num_programs=num_programs)

    def distance(key: _Key) -> float:
        """As a ratio: from 64 programs it is as far to 8 as to 512."""
        return max(key[4], num_programs) / min(key[4], num_programs)

    nearest = min(rows, key=distance)
    if distance(nearest) > _FARTHEST:
        return decode_rule(head_dim=head_dim, itemsize=itemsize, num_programs=num_programs)
    return _MEASURED[nearest]


def measured_rows() -> dict[_Key, DecodeTuning]:
    """All measured rows, by (device kind, head_dim, group, dtype of the pages, rows x kv heads)."""
    return dict(_MEASURED)


def decode_rule(*, head_dim: int, itemsize: int, num_programs: int) -> DecodeTuning:
    """Blocks of one pipeline stage's bytes, and splits until every multiprocessor has work."""
    # 8-bit keys and values are widened in registers: with 128 of head_dim 80 a thread spills 1.5 KB, with 64 of any
    # head_dim nothing (compiled for H100, jax 0.11.2, 2026-11-25).
    most = 64 if itemsize == 1 else 128
    block_kv = max(16, min(most, power_of_two_below(_STAGE_BYTES // (2 * head_dim * itemsize))))
    splits = power_of_two_below(max(1, _PROGRAMS_WANTED // num_programs))
    return DecodeTuning(
        block_kv=block_kv,
        num_splits=min(_MAX_SPLITS, splits),
        split_tokens=block_kv,
        num_warps=4,
        num_stages=3,
    )
