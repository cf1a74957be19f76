"""Captions of figures: title and legend above the axes; claims with verdicts, and notes, below.

The figure grows by the height of the text, so the axes keep their size. A plain figure has only the legend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadgen import plots
from loadgen.experiments.claims import Claim, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE_IN, TITLE_IN, LEGEND_IN = 0.165, 0.30, 0.27
"""Heights in inches of a line of 8-point type, of a title, and of a legend."""

CHARACTER_IN = 0.061
"""Mean width in inches of a character of 8-point type."""

MARGIN_IN = 0.1
COLOURS = {Verdict.MISSES: plots.VERMILION, Verdict.EXCEEDS: plots.BLUE, Verdict.NOT_SHOWN: plots.VERMILION}
QUIET = "#555555"
"""Colour of notes."""
HEADINGS = ("Claims of the paper", "Claims of our own")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """Text around a figure."""

    title: str
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    plain: bool = False  # only the legend


@dataclass(frozen=True, slots=True)
class _Text:
    """One piece of text under a figure."""

    line: int  # line number from the top, starting at 0
    left_in: float
    text: str
    colour: str = plots.BLACK
    bold: bool = False


def finish(fig: Figure, caption: Caption, *, legend: Any = None) -> None:
    """Write the caption around `fig`; the legend is taken from the axes `legend`, if given."""
    width_in, axes_in = fig.get_size_inches()
    texts = [] if caption.plain else _below(caption, width_in)
    lines = 1 + max((text.line for text in texts), default=-1)
    below_in = LINE_IN * lines + 0.12 if texts else 0.0
    title_in = 0.0 if caption.plain else TITLE_IN
    above_in = title_in + (LEGEND_IN if legend is not None else 0.0)
    height_in = axes_in + below_in + above_in
    fig.set_size_inches(width_in, height_in)
    fig.set_layout_engine("constrained", rect=(0, below_in / height_in, 1, axes_in / height_in))
    if not caption.plain:
        fig.text(0.5, 1 - 0.08 / height_in, caption.title, fontsize=11, ha="center", va="top")
    if legend is not None:
        handles, names = legend.get_legend_handles_labels()
        place = (0.5, 1 - (title_in or 0.05) / height_in)
        fig.legend(
            handles, names, loc="upper center", bbox_to_anchor=place, ncols=len(names), frameon=False, borderaxespad=0
        )
    for text in texts:
        y_in = below_in - 0.05 - LINE_IN * (text.line + 1)
        weight = "bold" if text.bold else "normal"
        fig.text(
            text.left_in / width_in,
            y_in / height_in,
            text.text,
            fontsize=8,
            color=text.colour,
            va="bottom",
            weight=weight,
        )


def _below(caption: Caption, width_in: float) -> list[_Text]:
    """The claims and notes of a caption, as text under the figure."""
    texts: list[_Text] = []
    labels = [_label(claim) for claim in caption.claims]
    label_in = CHARACTER_IN * (2 + max(map(len, (*labels, HEADINGS[0]))))
    for own, heading in enumerate(HEADINGS):
        claims = [claim for claim in caption.claims if claim.own is bool(own)]
        if claims:
            texts += _table(heading, claims, label_in, width_in, _next_line(texts))
    for note in caption.notes:
        for piece in textwrap.wrap(f"Note: {note}", int((width_in - 2 * MARGIN_IN) / CHARACTER_IN)):
            texts.append(_Text(_next_line(texts), MARGIN_IN, piece, QUIET))
    return texts


def _next_line(texts: Sequence[_Text]) -> int:
    return 1 + max((text.line for text in texts), default=-1)


def _table(heading: str, claims: Sequence[Claim], label_in: float, width_in: float, line: int) -> list[_Text]:
    """One row per statement, one column per case of the figure."""
    cases = list(dict.fromkeys(claim.case for claim in claims))
    rows: dict[str, list[Claim]] = {}
    for claim in claims:
        rows.setdefault(_label(claim), []).append(claim)
    cell_in = (width_in - MARGIN_IN - label_in) / len(cases)
    lefts = {case: MARGIN_IN + label_in + index * cell_in for index, case in enumerate(cases)}
    texts = [_Text(line, MARGIN_IN, heading, bold=True)]
    texts += [_Text(line, lefts[case], case, bold=True) for case in cases if case]
    for row, (label, found) in enumerate(rows.items(), start=line + 1):
        texts.append(_Text(row, MARGIN_IN, label))
        texts += [_Text(row, lefts[c.case], _cell(c), COLOURS.get(c.verdict, plots.BLACK)) for c in found]
    return texts


def _label(claim: Claim) -> str:
    return claim.text if claim.own else f"{claim.text} (paper: {claim.paper_text})"


def _cell(claim: Claim) -> str:
    beyond = claim.ci95_text if claim.own else claim.spread_text.removesuffix(" points")
    return f"{claim.verdict_text}: {claim.value_text}{f' ({beyond})' if beyond else ''}"
