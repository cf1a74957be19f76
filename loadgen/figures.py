"""The paper's figures by name; `deepar simulate FIG` makes one, `deepar simulate all` makes all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bus.errors import UnknownNameError
from loadgen import figures_multi, figures_single
from loadgen.figure_result import FigureOptions, FigureResult

FIGURES: dict[str, Callable[[FigureOptions], FigureResult]] = {
    "fig1a": figures_single.fig1a,
    "fig1b": figures_single.fig1b,
    "fig3": figures_single.fig3,
    **{name: partial(figures_multi.make, name) for name in figures_multi.SETTINGS},
}
"""Name -> what makes it."""


def make(name: str, options: FigureOptions) -> FigureResult:
    """Make one figure. Raises `UnknownNameError`."""
    if name not in FIGURES:
        raise UnknownNameError(f"there is no figure {name!r}; there are {', '.join(FIGURES)}")
    return FIGURES[name](options)
