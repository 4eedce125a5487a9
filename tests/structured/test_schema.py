"""References within a JSON schema."""

from __future__ import annotations

import pytest

from jaxserve.structured.schema import find

ROOT = {
    "$defs": {"a": {"type": "string"}, "b/c~": {"type": "null"}, "no": "schema"},
    "anyOf": [True, {"type": "integer"}],
}


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        ("#", ROOT),
        ("#/$defs/a", {"type": "string"}),
        ("#/$defs/b~1c~0", {"type": "null"}),
        ("#/anyOf/0", True),
        ("#/anyOf/1", {"type": "integer"}),
        ("#/anyOf/2", None),
        ("#/anyOf/x", None),
        ("#/$defs/no", None),
        ("#/$defs/none", None),
        ("#a", None),  # an anchor
        ("https://x/y#/$defs/a", None),
        ("", None),
        (1, None),
    ],
)
def test_find(reference: object, target: object) -> None:
    assert find(ROOT, reference) == target
