"""`--learn/--no-learn` and its key in the file of `deepar up` reach the planner's core; learning is the default there."""

from __future__ import annotations

import pytest

from bus.memory.bus import MemoryBroker, MemoryBus
from deploy.commands.services.planner import (
    DecisionOptions,
    LeadershipOptions,
    PlannerRegionOptions,
    QueueOptions,
    planner_setup,
)
from deploy.services import up, wiring
from deploy.services.settings import PlannerOptions, UpSettings
from deploy.services.wiring import PlannerSetup


def learns(setup: PlannerSetup) -> bool:
    service = wiring.make_planner(MemoryBus(MemoryBroker(), "planner"), setup)
    return service.context.core.options.learning


@pytest.mark.parametrize(("decisions", "wanted"), [(DecisionOptions(), True), (DecisionOptions(learn=False), False)])
def test_the_flag_of_deepar_planner_reaches_the_core(decisions: DecisionOptions, wanted: bool) -> None:
    setup = planner_setup(PlannerRegionOptions(), decisions, QueueOptions(), LeadershipOptions())
    assert learns(setup) is wanted


@pytest.mark.parametrize(("planner", "wanted"), [(PlannerOptions(), True), (PlannerOptions(learn=False), False)])
def test_the_key_of_the_file_reaches_the_core(planner: PlannerOptions, wanted: bool) -> None:
    assert learns(up.planner_setup(UpSettings(), planner, None)) is wanted
