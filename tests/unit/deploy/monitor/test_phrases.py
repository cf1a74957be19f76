"""The words for placements: what is cut, and what is reserved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bus.values import DELAY_PARTS, Codec, Kind, Placement, Route
from deploy.monitor import phrases
from deploy.monitor.phrases import cut_column, cuts_text, grants_text, place_text

LAYERS = ("input", "conv", "pool", "dense")


def placement(kind: Kind, cut1: int, cut2: int, link1_bps: int = 0, link2_bps: int = 0) -> Placement:
    return Placement(
        kind=kind, edge=None if kind is Kind.DEVICE else "e1", cut1=cut1, cut2=cut2, cut1_name=LAYERS[cut1],
        cut2_name=LAYERS[cut2], link1_bps=link1_bps, link2_bps=link2_bps,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "cuts", "text", "column"),
    [
        (Kind.DEVICE, (3, 3), "uncut", "device alone"),
        (Kind.EDGE, (0, 3), "uncut", "edge alone"),
        (Kind.CLOUD, (0, 0), "uncut", "cloud alone"),
        (Kind.DEVICE_EDGE, (1, 3), "cut after conv", "conv"),
        (Kind.DEVICE_CLOUD, (2, 2), "cut after pool", "pool"),
        (Kind.EDGE_CLOUD, (0, 2), "cut after pool", "pool"),
        (Kind.DEVICE_EDGE_CLOUD, (1, 2), "cut after conv | pool", "conv, pool"),
    ],
)
def test_only_layers_between_two_tiers_are_named_as_cuts(
    kind: Kind, cuts: tuple[int, int], text: str, column: str
) -> None:
    assert Kind.of(*cuts, 3) is kind
    place = placement(kind, *cuts)
    assert cuts_text(place) == text
    assert cut_column(kind, place.cut1_name, place.cut2_name) == column


def test_only_links_that_are_used_are_named() -> None:
    assert grants_text(placement(Kind.DEVICE, 3, 3)) == ""
    assert grants_text(placement(Kind.EDGE, 0, 3, 1_000_000_000)) == "1 Gbps on link 1"
    both = placement(Kind.DEVICE_CLOUD, 1, 1, 500_000_000, 20_000_000)
    assert place_text(both) == "device+cloud through e1, cut after conv, 500 Mbps on link 1, 20 Mbps on link 2"
    assert place_text(placement(Kind.DEVICE, 3, 3)) == "device, uncut"


@pytest.mark.parametrize(
    ("kind", "cuts", "codecs", "text"),
    [
        (Kind.DEVICE_EDGE_CLOUD, (1, 2), (Codec.Q8, Codec.RAW), "cut after conv q8 | pool"),
        (Kind.DEVICE_EDGE, (1, 3), (Codec.ZSTD, Codec.RAW), "cut after conv zstd"),
        (Kind.DEVICE_CLOUD, (2, 2), (Codec.Q4, Codec.Q4), "cut after pool q4"),
        (Kind.EDGE_CLOUD, (0, 2), (Codec.RAW, Codec.Q4), "cut after pool q4"),
        (Kind.EDGE_CLOUD, (0, 2), (Codec.Q8, Codec.Q4), "cut after input q8 | pool q4"),
        (Kind.CLOUD, (0, 0), (Codec.ZSTD, Codec.ZSTD), "cut after input zstd"),
    ],
)
def test_the_codec_of_each_crossing_is_named(
    kind: Kind, cuts: tuple[int, int], codecs: tuple[Codec, Codec], text: str
) -> None:
    route = Route(
        cut1=cuts[0], cut2=cuts[1], share=1.0, codec1=codecs[0], codec2=codecs[1], stations_s=(1, 1, 1, 1, 1, 1, 1)
    )
    place = placement(kind, *cuts).model_copy(update={"routes": (route,)})
    assert cuts_text(place) == text
    other = route.model_copy(update={"share": 0.5})
    both = cuts_text(place.model_copy(update={"routes": (other, other)}))
    assert all(codec.value in both for codec in codecs if codec is not Codec.RAW)


def test_several_routes_are_named_by_their_shares_and_numbers_of_layers() -> None:
    routes = (
        Route(cut1=1, cut2=2, share=0.62, stations_s=(1, 1, 1, 1, 1, 1, 1)),
        Route(cut1=3, cut2=3, share=0.25, stations_s=(9, 0, 0, 0, 0, 0, 0)),
        Route(cut1=0, cut2=0, share=0.13, stations_s=(0, 1, 0, 1, 1, 1, 1)),
    )
    place = placement(Kind.DEVICE_EDGE_CLOUD, 1, 2, 500_000_000, 20_000_000).model_copy(update={"routes": routes})
    assert cuts_text(place) == "3 routes: 62 % 1 | 2, 25 % device, 13 % 0 | 0"
    assert place_text(place).startswith("device+edge+cloud through e1, 3 routes: 62 % 1 | 2, ")


def test_the_page_lists_the_parts_of_a_delay_as_the_messages_do() -> None:
    page = (Path(phrases.__file__).parent / "ui" / "page.js").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^const STATIONS = (\[.*\]);$", page, re.MULTILINE)
    assert tuple(json.loads(listed)) == DELAY_PARTS
