"""The `paper` profile gives the paper's numbers, and a profile of one's own is read."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import planner
from bus.errors import ConfigError, UnknownNameError
from bus.values import Codec, Objective, Role
from loadgen.experiments import fit_paper
from loadgen.experiments.paper_networks import TABLES
from planner.search.profiles import load_profile, with_codecs, without_codecs
from planner.search.what_if import Constraints, Situation, plans

SHIPPED = Path(planner.__file__).with_name("data") / "paper.json"

PAPER = load_profile("paper")
ALL = frozenset(Role)


def test_a_fitted_profile_gets_the_codecs_measured_on_trained_models_and_says_so() -> None:
    found = with_codecs(PAPER)
    assert "LeNet" in found.assumed
    assert not PAPER.assumed
    for tier in (found.device, found.edge, found.cloud):
        for model, profile in tier.items():
            assert {one.position for one in profile.codecs or ()} == set(range(1, profile.layers))  # never the input
            assert all(one.bytes < profile.cut_bytes[one.position] for one in profile.codecs or ()), model
            assert profile.agreement((1, Codec.Q8), (2, Codec.Q8)) == 1.0
    assert without_codecs(found).device == PAPER.device


def test_a_measured_profile_keeps_its_codecs_and_gets_no_assumed_ones() -> None:
    measured = replace(with_codecs(PAPER), fitted_to=(), assumed="")
    assert with_codecs(measured) is measured
    with pytest.raises(ConfigError, match="has no codecs"):
        with_codecs(replace(PAPER, fitted_to=()))


def best_ms(model: str, only: Role | None = None) -> float:
    """Delay of one sample on one tier alone, or of the best plan."""
    constraints = Constraints() if only is None else Constraints(frozenset({only}), ALL - {only})
    situation = Situation(
        PAPER.device[model],
        PAPER.edge[model],
        PAPER.cloud[model],
        PAPER.link1_bps,
        PAPER.link2_bps,
        input_bytes=PAPER.input_bytes[model],
        constraints=constraints,
    )
    return 1e3 * plans(situation)[0].delay_s


def test_figure_1a() -> None:
    for only, wanted_ms in ((Role.DEVICE, 84.0), (Role.EDGE, 64.0), (Role.CLOUD, 314.0), (None, 43.0)):
        assert best_ms("alexnet", only) == pytest.approx(wanted_ms, rel=0.01)


def test_figure_1a_cuts_are_best_by_a_margin() -> None:
    situation = Situation(
        PAPER.device["alexnet"],
        PAPER.edge["alexnet"],
        PAPER.cloud["alexnet"],
        PAPER.link1_bps,
        PAPER.link2_bps,
        input_bytes=PAPER.input_bytes["alexnet"],
    )
    first, second = plans(situation, 2)
    assert (first.cut1_name, first.cut2_name) == ("maxpool_1", "maxpool_3")
    assert second.delay_s > first.delay_s * 1.02


@pytest.mark.parametrize("model", ["vgg16", "deepface"])
def test_figure_3_large_networks(model: str) -> None:
    best = best_ms(model)
    assert all(best < 0.95 * best_ms(model, only) for only in Role)
    assert 0.70 <= best / best_ms(model, Role.EDGE) <= 0.90


def test_figure_3_lenet() -> None:
    best = best_ms("lenet")
    assert best_ms("lenet", Role.CLOUD) == pytest.approx(best, rel=0.01)
    assert best < 0.6 * best_ms("lenet", Role.DEVICE)
    assert best < 0.6 * best_ms("lenet", Role.EDGE)


def test_the_file_is_what_the_script_makes_of_its_coefficients() -> None:
    shipped = json.loads(SHIPPED.read_text())
    values = [v for tier in fit_paper.TIERS for v in shipped["coefficients_ms"][tier].values()]
    fit = np.log([*values, shipped["link1_bps"], shipped["link2_bps"], shipped["input_bytes"]["alexnet"]])
    assert fit_paper.single_task_loss(fit) < 1e-6
    again = fit_paper.profiles(fit)
    for tier in fit_paper.TIERS:
        for model, profile in again[tier].items():
            assert getattr(PAPER, tier)[model].layer_s == pytest.approx(profile.layer_s, abs=1e-11)
            assert getattr(PAPER, tier)[model].cut_bytes == profile.cut_bytes


def test_the_scripts_closed_form_is_the_cost_models() -> None:
    shipped = json.loads(SHIPPED.read_text())
    values = [v for tier in fit_paper.TIERS for v in shipped["coefficients_ms"][tier].values()]
    fit = np.log([*values, shipped["link1_bps"], shipped["link2_bps"], shipped["input_bytes"]["alexnet"]])
    for model in TABLES:
        assert fit_paper.delays_ms(fit, model).min() == pytest.approx(best_ms(model), rel=1e-6)


def test_figure_4_in_small() -> None:
    """One cell that the fit never saw: DeePar far below device-only and cloud-only, and below edge-only."""
    devices, seed = 70, 21
    assert devices not in fit_paper.DEVICES
    assert seed not in fit_paper.FIGURE_4_SEEDS
    rows = {tier: getattr(PAPER, tier) for tier in fit_paper.TIERS}
    means = {
        policy: fit_paper.mean_delay_s(rows, policy, edges=10, within_s=50.0, devices=devices, seed=seed)
        for policy in ("deepar", "device-only", "edge-only", "cloud-only", "no-delay")
    }
    assert means["deepar"] < 0.4 * means["device-only"]
    assert means["deepar"] < 0.45 * means["cloud-only"]
    assert means["deepar"] < 0.85 * means["edge-only"]
    assert means["deepar"] < means["no-delay"]


def test_no_coefficient_is_larger_on_a_more_powerful_platform() -> None:
    shipped = json.loads(SHIPPED.read_text())["coefficients_ms"]
    for name, device in shipped["device"].items():
        assert device >= shipped["edge"][name] >= shipped["cloud"][name], name


def test_the_profile_says_what_it_was_fitted_to() -> None:
    assert PAPER.fitted_to == fit_paper.FITTED_TO
    assert PAPER.fit_seeds == fit_paper.FIGURE_4_SEEDS
    assert "fitted" in PAPER.origin


def test_tables_of_the_networks_agree_with_what_is_published() -> None:
    """Krizhevsky: 62 M parameters in one tower; Simonyan and Zisserman: 138 M, 15.5 G multiply-accumulates."""
    weights = {name: sum(layer.weight_bytes for layer in table.layers) / 4e6 for name, table in TABLES.items()}
    macs = {name: sum(layer.macs for layer in table.layers) / 1e9 for name, table in TABLES.items()}
    assert weights["alexnet"] == pytest.approx(62.4, abs=0.1)
    assert weights["vgg16"] == pytest.approx(138.4, abs=0.1)
    assert macs["vgg16"] == pytest.approx(15.5, abs=0.05)
    assert weights["lenet"] == pytest.approx(0.0617, abs=0.0001)
    names = [layer.name for layer in TABLES["alexnet"].layers]
    assert names[2] == "maxpool_1"
    assert names[9] == "maxpool_3"


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    shipped = json.loads(SHIPPED.read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**shipped, "name": "mine", "link1_bps": 5}))
    assert load_profile(path).link1_bps == 5
    assert load_profile(path).models == PAPER.models
    path.write_text("{}")
    with pytest.raises(ConfigError, match="version"):
        load_profile(path)
    path.write_text(json.dumps({"version": 1}))
    with pytest.raises(ConfigError, match="broken"):
        load_profile(path)
    with pytest.raises(UnknownNameError, match="paper"):
        load_profile("papre")


def test_pipelined_never_takes_longer() -> None:
    for objective, samples in ((Objective.PIPELINED, 100), (Objective.PIPELINED, 1)):
        for model in PAPER.models:
            situation = Situation(
                PAPER.device[model], PAPER.edge[model], PAPER.cloud[model], PAPER.link1_bps, PAPER.link2_bps, samples
            )
            streamed = plans(
                Situation(
                    PAPER.device[model],
                    PAPER.edge[model],
                    PAPER.cloud[model],
                    PAPER.link1_bps,
                    PAPER.link2_bps,
                    samples,
                    objective,
                )
            )
            assert streamed[0].delay_s <= plans(situation)[0].delay_s * (1 + 1e-12)
