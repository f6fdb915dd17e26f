"""Rows as Markdown tables, and numbers as one would say them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Columns = Mapping[str, "str | tuple[str, Callable[[Any], Any]]"]
"""Key of a row → heading, or heading and how a value is shown."""


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """The columns of the rows as a Markdown table; those that no row has a value for are left out."""
    kept = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}

    def cell(value: Any, column: str | tuple[str, Callable[[Any], Any]]) -> Any:
        return value if value is None or isinstance(column, str) else column[1](value)

    names = {key: column if isinstance(column, str) else column[0] for key, column in kept.items()}
    return markdown_table([{names[key]: cell(row.get(key), column) for key, column in kept.items()} for row in rows])


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table for a document, numbers to three digits and to the right; columns in the rows' own order."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    right = [_is_number_column(rows, column) for column in columns]
    widths = [max([3, len(c), *(len(row[i]) for row in cells)]) for i, c in enumerate(columns)]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(columns), line(rule), *map(line, cells)])


def _is_number_column(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


def times(value: float) -> str:
    return f"× {value:.3g}" if value < 100 else f"× {value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def megabytes(value: float) -> float:
    return value / 1e6


def yes(value: bool) -> str:
    return "yes" if value else "no"


def plural(number: Any, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
