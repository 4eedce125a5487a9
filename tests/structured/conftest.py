"""Nothing in this folder is refused for the processor's time, of which a slow machine takes more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jaxserve.structured import blame, compiler
from tests.patience import PATIENCE


@pytest.fixture(scope="package", autouse=True)
def no_limits_of_time() -> Iterator[None]:
    """What is refused, is so for its size; what is at fault is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "MAX_SECONDS", PATIENCE)
        patch.setattr(blame, "_MAX_SECONDS", PATIENCE)
        yield
