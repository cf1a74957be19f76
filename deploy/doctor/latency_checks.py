"""Check of `deepar doctor` that compares measured latencies with declared ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from bus.messages import LearnedLink, NodeAnnounced
from bus.text.units import format_seconds
from deploy.doctor.machine_checks import Check
from planner.learning.lessons import Lessons, link_name

GROSS = 2.0
"""Factor between a declared and a measured latency from which the declaration counts as wrong..."""
GROSS_S = 0.005
"""...if they also differ by this much: the bus alone takes some milliseconds."""


def latency_checks(regions: Iterable[Lessons], nodes: Mapping[str, NodeAnnounced]) -> list[Check]:
    """Report links whose measured latency differs grossly from the declared one; none if there are no such links."""
    told = [text for lessons in regions for text in _contradictions(lessons, nodes)]
    if not told:
        return []
    remedy = (
        "predictions use what was measured; correct --link1-latency or --link2-latency of the node, or find what delays "
        "the link"
    )
    return [Check("latency", True, "; ".join(told), remedy, warning=True)]


def _contradictions(lessons: Lessons, nodes: Mapping[str, NodeAnnounced]) -> Iterator[str]:
    for lesson in lessons.links.values():
        link = lesson.value
        declared_s = _declared_s(link, nodes)
        if declared_s is None:
            continue
        less_s, more_s = sorted((declared_s, link.latency_s))
        if more_s > GROSS * less_s and more_s - less_s > GROSS_S:
            declared, measured = format_seconds(declared_s), format_seconds(link.latency_s)
            yield f"{link_name(link)}: {declared} declared, {measured} measured"


def _declared_s(link: LearnedLink, nodes: Mapping[str, NodeAnnounced]) -> float | None:
    """The latency that the device of link 1 or the edge of link 2 has announced."""
    node = nodes.get((link.device or "") if link.link == 1 else link.edge)
    if node is None:
        return None
    return node.link1_latency_s if link.link == 1 else node.link2_latency_s
