"""How code that runs a few times is compiled: in less than half the time, and to what is slower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

# Two files of engine tests took 60 s of processor time, 41 with the first option and 25 with both.  From 0.11 on XLA
# has one way only to write fusions for CPUs (jax 0.10.2, 2026-11-26).
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False


def interpretable(function: Callable[..., Any], *, interpret: bool, **options: Any) -> Callable[..., Any]:
    """A kernel with these options, jitted; an interpreted one is much code that runs once."""
    return jax.jit(
        partial(function, interpret=interpret, **options), compiler_options=QUICK if interpret else None
    )
