"""What all tests share: hypothesis does not judge by the clock, which a busy machine would fail."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("jaxserve", deadline=None)
settings.load_profile("jaxserve")
