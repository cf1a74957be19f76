"""The tables of `--help` on narrow terminals.

Typer cuts a word that is wider than its column: at 80 columns `KAFKA_BOOTSTRAP_SERVERS` loses its end. It has no
option for it, so its tables are replaced by ones that break such a word over two lines.
"""

from __future__ import annotations

from typing import Any

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from typer import rich_utils


class _FoldingTable(Table):
    def add_row(self, *cells: Any, **style: Any) -> None:
        super().add_row(*cells, **style)
        _fold(self)


class _FoldingColumns(Columns):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            if isinstance(part, Table):
                _fold(part)
            yield part


def _fold(table: Table) -> None:
    for column in table.columns:
        column.overflow = "fold"


def fold_long_words() -> None:
    """Make help tables break long words from now on."""
    for name, folding in (("Table", _FoldingTable), ("Columns", _FoldingColumns)):
        assert hasattr(rich_utils, name), f"typer.rich_utils has no {name} any more"
        setattr(rich_utils, name, folding)
