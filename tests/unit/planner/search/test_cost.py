"""The delay parts (1)-(6), (7), and the pipelined objective, against numbers worked out by hand."""

import pytest

from bus.errors import ConfigError
from bus.values import Objective, Parts
from planner.search.cost import Costs, PlatformRow, RowTable
from tests.unit.planner.scenes import faster, profile

DEVICE = profile("m", (1.0, 2.0, 3.0), (4000, 2000, 1000, 500))
COSTS = Costs(PlatformRow(DEVICE), PlatformRow(faster(DEVICE, 2)), PlatformRow(faster(DEVICE, 10)))
B1, B2 = 8000, 4000  # 1,000 and 500 bytes a second


def test_all_six_parts_of_a_placement_on_all_three_tiers() -> None:
    parts = COSTS.parts(1, 2, B1, B2, samples=3)
    assert parts.model_dump() == pytest.approx(
        {
            "device_s": 3 * 1.0,
            "link1_s": 3 * 2.0,
            "edge_s": 3 * 1.0,
            "link2_s": 3 * 2.0,
            "cloud_s": 3 * 0.3,
            "result_s": 3 * (1.0 + 0.5),
        }
    )


def test_sequential_is_the_sum_and_pipelined_fills_and_drains_around_the_slowest_station() -> None:
    one = 1.0 + 2.0 + 1.0 + 2.0 + 0.3 + 1.5
    assert COSTS.delay_s(1, 2, B1, B2, 3, Objective.SEQUENTIAL) == pytest.approx(3 * one)
    assert COSTS.delay_s(1, 2, B1, B2, 3, Objective.PIPELINED) == pytest.approx(one + 2 * 2.0)
    assert COSTS.delay_s(1, 2, B1, B2, 1, Objective.PIPELINED) == COSTS.delay_s(1, 2, B1, B2, 1, Objective.SEQUENTIAL)


def test_each_half_of_the_result_is_a_station_of_its_own() -> None:
    small = profile("m", (0.001, 0.001), (1, 1, 4000))
    row = PlatformRow(small)
    parts = Costs(row, row, row).sample_parts(0, 1, B1, B2)
    assert (parts.s6b, parts.s6a) == (8.0, 4.0)
    assert Costs(row, row, row).delay_s(0, 1, B1, B2, 2, Objective.PIPELINED) == pytest.approx(sum(parts) + 8.0)


@pytest.mark.parametrize(
    ("cut1", "cut2", "expected"),
    [
        (3, 3, Parts(device_s=6.0)),  # nothing is sent
        (0, 3, Parts(link1_s=4.0, edge_s=3.0, result_s=0.5)),  # link 2 is not used
        (1, 1, Parts(device_s=1.0, link1_s=2.0, link2_s=4.0, cloud_s=0.5, result_s=1.5)),  # the edge relays
        (0, 0, Parts(link1_s=4.0, link2_s=8.0, cloud_s=0.6, result_s=1.5)),  # the input crosses both links
    ],
)
def test_what_is_not_used_costs_nothing(cut1: int, cut2: int, expected: Parts) -> None:
    parts = COSTS.parts(cut1, cut2, B1, B2, samples=1)
    assert parts.model_dump() == pytest.approx(expected.model_dump())


def test_the_tasks_own_input_replaces_g0_wherever_the_input_crosses_and_nowhere_else() -> None:
    assert COSTS.parts(0, 0, B1, B2, 1, input_bytes=1000).link1_s == 1.0
    assert COSTS.parts(0, 0, B1, B2, 1, input_bytes=1000).link2_s == 2.0
    assert COSTS.parts(1, 1, B1, B2, 1, input_bytes=1000) == COSTS.parts(1, 1, B1, B2, 1)


def test_rows_of_another_model_are_refused() -> None:
    other = PlatformRow(profile("m", (1.0, 2.0, 3.0), (4000, 2000, 1000, 500), sha256="1" * 64))
    with pytest.raises(ConfigError, match="different models"):
        Costs(PlatformRow(DEVICE), other, None)


def test_equal_profiles_share_a_row() -> None:
    table = RowTable()
    assert table.row(DEVICE) is table.row(DEVICE.model_copy(update={"platform": "another"}))
    assert table.row(DEVICE) is not table.row(faster(DEVICE, 2))
