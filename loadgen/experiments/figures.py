"""The paper's figures by name; `deepar simulate FIG` makes one, `deepar simulate all` makes all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bus.errors import unknown_name
from loadgen.experiments import figures_multi, figures_single
from loadgen.experiments.figure_result import FigureOptions, FigureResult

FIGURES: dict[str, Callable[[FigureOptions], FigureResult]] = {
    "fig1a": figures_single.fig1a,
    "fig1b": figures_single.fig1b,
    "fig3": figures_single.fig3,
    **{name: partial(figures_multi.make, name) for name in figures_multi.SETTINGS},
}
"""Name -> function that makes the figure."""


def make(name: str, options: FigureOptions) -> FigureResult:
    """Make one figure. Raises `UnknownNameError`."""
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    return FIGURES[name](options)
