"""What the command line prints: aligned tables and headings, with rich where it is installed and plainly otherwise."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def heading(text: str) -> None:
    """One line that opens a stage of a longer run."""
    print(f"\n== {text}", flush=True)


def line(text: str = "") -> None:
    """One line of the story, flushed so that it is seen while the next step runs."""
    print(text, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """Print rows under headings; a column of numbers or percentages is aligned to the right.

    Parameters
    ----------
    columns : headings, one per column.
    rows : cells; floats are shown with three decimals, None as "-".
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    if sys.stdout.isatty() and _print_rich(columns, cells, right, title):
        return
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    if title:
        print(title)
    for row in [list(columns), ["-" * w for w in widths], *cells]:
        print("  " + "  ".join(c.rjust(w) if r else c.ljust(w)
                               for c, w, r in zip(row, widths, right, strict=True)).rstrip())
    sys.stdout.flush()


def bar(total: int, *, start: int = 0, label: str = "", unit: str = "it") -> Any:
    """A progress bar on standard error with ``n``, ``update`` and ``close``, or None where tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=start, desc=label, unit=unit, leave=False, dynamic_ncols=True, file=sys.stderr)


def percent(value: float | None) -> str:
    """0.8312 -> "83.1 %"; None -> "-"."""
    return "-" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _is_number(cell: Any) -> bool:
    return cell is None or isinstance(cell, (int, float)) or str(cell).endswith("%")


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _print_rich(columns: Sequence[str], cells: list[list[str]], right: list[bool], title: str) -> bool:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for name, is_number in zip(columns, right, strict=True):
        shown.add_column(name, justify="right" if is_number else "left")
    for row in cells:
        shown.add_row(*row)
    Console().print(shown)
    return True
