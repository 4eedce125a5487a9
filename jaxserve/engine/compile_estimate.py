"""How long compiling all programs may take: typical figures, for an operator who wonders whether to wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Typical:
    """Seconds of one processor for one program."""

    layer: float  # of a forward pass, each layer
    forward: float  # the rest of a forward pass
    greedy: float  # a sampler that takes the most likely token
    sampler: float  # one that does more
    small: float  # everything else
    traced: float  # of a forward pass, under the interpreter's lock: no other program is traced meanwhile


# cpu: jax 0.10.2, 2 cores, 2026-11-23: a forward pass of 30 layers 3 s, a dozen programs half a minute.
# gpu: jax 0.11.2, H100, 16 cores, 2026-11-25: the 51 programs of a Llama 8B 37 s.  They use 300 s of processor time;
# the figures count in what they spend waiting for locks, of the tuner and of the Hopper kernels' compiler.
# Others have not been measured, and are taken to be like a GPU.
_TYPICAL = {
    "cpu": _Typical(layer=0.09, forward=0.3, greedy=0.4, sampler=2.5, small=0.3, traced=0.15),
    "gpu": _Typical(layer=0.9, forward=1.0, greedy=4.0, sampler=8.0, small=0.3, traced=0.4),
}


def compile_seconds(programs: Iterable[str], platform: str, num_layers: int, num_processors: int) -> float:
    """Seconds from the first to the last of these programs (their names) with nothing in the cache, estimated."""
    typical = _TYPICAL.get(platform, _TYPICAL["gpu"])
    longest = total = traced = 0.0
    for name in programs:
        if name.startswith(("forward", "burst", "tower")):
            seconds = typical.forward + typical.layer * num_layers
            traced += typical.traced
        elif name.startswith("sample_greedy") and "logprobs" not in name:
            seconds = typical.greedy
        elif name.startswith("sample"):
            seconds = typical.sampler
        else:
            seconds = typical.small
        total += seconds
        longest = max(longest, seconds)
    return max(total / num_processors, traced + longest)
