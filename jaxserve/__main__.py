"""`python -m jaxserve`: the same as the `jaxserve` command."""

from __future__ import annotations

import sys

from jaxserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
