"""Table of `deepar simulate sweep`: by how much the delays of a policy are lower than those of another one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from loadgen.experiments.paired import Gain, PairedGains


def gain_table(found: Sequence[PairedGains]) -> Table:
    """One row for each point and policy."""
    against = found[0].against
    title = f"By how much delays are below those of {against} on the same tasks (negative: above), with 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("point", "policy"):
        table.add_column(name, overflow="fold")
    for name in ("mean", "p99"):
        table.add_column(name, justify="right")
    for gains in found:
        table.add_row(", ".join(gains.point), gains.policy, _text(gains.mean), _text(gains.p99))
    return table


def _text(gain: Gain) -> str:
    text = f"{100 * gain.share:.1f} %"
    return text if gain.ci95 is None else f"{text} ({100 * gain.ci95[0]:.1f} to {100 * gain.ci95[1]:.1f})"
