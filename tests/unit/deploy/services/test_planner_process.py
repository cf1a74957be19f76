"""`deepar planner --regions`."""

from __future__ import annotations

import pytest

from bus.errors import ConfigError
from deploy.services.planner_process import parse_regions


@pytest.mark.parametrize(("text", "regions"), [("all", None), ("ALL", None), ("0", (0,)), ("2,0,2, 1", (0, 1, 2))])
def test_regions_are_all_or_a_list(text: str, regions: tuple[int, ...] | None) -> None:
    assert parse_regions(text) == regions


@pytest.mark.parametrize("text", ["", "some", "0,", "-1", "0;1"])
def test_anything_else_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--regions"):
        parse_regions(text)
