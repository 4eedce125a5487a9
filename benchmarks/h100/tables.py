"""Tables on the terminal, in plain text so that logs keep them."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str | float | int | None]]
) -> None:
    """Columns aligned to the right, the first to the left; None becomes a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )

    print(f"\n{title}\n{line(header)}\n" + "\n".join(line(row) for row in cells), flush=True)


def ratio(better: float | None, than: float | None) -> str | None:
    """`better / than` as "1.05x", None if either is missing."""
    return f"{better / than:.2f}x" if better and than else None


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
