"""How long tests wait for what must come: it ends a test that hangs, and measures nothing."""

PATIENCE = 120.0  # seconds; a busy machine may stand still for some
