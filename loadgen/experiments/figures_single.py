"""Figures 1(a), 1(b) and 3: one task alone, one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bus.values import DELAY_PARTS, ModelProfile, Role
from loadgen import plots
from loadgen.experiments import claims as rules
from loadgen.experiments.captions import Caption, finish
from loadgen.experiments.claims import Claim
from loadgen.experiments.figure_result import FigureOptions, FigureResult, write_csv
from loadgen.replay.outcome import Outcome
from loadgen.replay.report import PART_COLOURS
from loadgen.sim.core_driver import drive
from loadgen.sim.platforms import Platforms, measured, platforms
from loadgen.sim.scenario import Scenario

PART_LABELS = ("device computes", "link 1", "edge computes", "link 2", "cloud computes", "result")
BARS = ("device-only", "edge-only", "cloud-only", "deepar")
"""The paper's bars of these figures, in its order."""

ONE_SEED = (0,)
"""A single task involves no randomness, so one seed is enough."""

FIG1A_MS = {"device-only": 84.0, "edge-only": 64.0, "cloud-only": 314.0, "deepar": 43.0}
FIG1A_CUTS = ("maxpool_1", "maxpool_3")
FIG3_MODELS = {"vgg16": "VGG", "deepface": "DeepFace", "lenet": "LeNet"}
SAME = 0.01  # "the same delay" within a percent
DOMINATE = 50.0  # percent: more than all other parts together
FAR_BELOW = 0.7  # "much lower": at most this share


def one_task_scenario(platform: Platforms, model: str, policy: str, *, profile: str = "paper") -> Scenario:
    """One sample of one model, alone on one device, one edge and the cloud, with the links of the one-task
    experiments.
    """
    return Scenario(
        name="one-task",
        devices=1,
        edges=1,
        reachable=None,
        arrivals="offline",
        models={model: 1.0},
        samples=(1, 1),
        input_bytes=(platform.input_bytes[model],) * 2,
        max_link1_bps=None,
        max_link2_bps=None,
        edge_link1_bps=(platform.link1_bps,) * 2,
        edge_link2_bps=(platform.link2_bps,) * 2,
        slots=(1, 1),
        policy=policy,
        profile=profile,
    )


def one_task(platform: Platforms, model: str, policy: str, *, profile: str = "paper") -> Outcome:
    """Run that task and return its outcome."""
    return drive(one_task_scenario(platform, model, policy, profile=profile), 0, platform)[0]


def fig1a(options: FigureOptions) -> FigureResult:
    """Make Figure 1(a): delay of AlexNet on the device, the edge and the cloud, and cut between them."""
    platform = measured(options.progress) if options.live else platforms(options.profile)
    outcomes = {policy: one_task(platform, "alexnet", policy, profile=options.profile) for policy in BARS}
    claims = [] if options.live else rules.as_fitted(_fig1a_claims(outcomes), "fig1a" in platform.fitted_to)
    notes = [
        (
            f"links {platform.link1_bps / 1e6:.1f} and {platform.link2_bps / 1e6:.1f} Mbps, "
            f"input {platform.input_bytes['alexnet'] / 1e3:.0f} kB; {platform.origin}"
        )
    ]
    if options.live:
        placement = outcomes["deepar"].placement
        assert placement is not None
        notes.append(f"DeePar cuts after {placement.cut1_name} and {placement.cut2_name} ({placement.kind})")
    fig, axes = plots.figure(7.0, 3.6)
    names = ["Device", "Edge", "Cloud", "Hybrid (DeePar)"]
    _stacked(axes, names, [outcomes[policy] for policy in BARS], paper=None if options.live else FIG1A_MS)
    axes.set(ylabel="delay of one sample (ms)")
    title = f"Fig. 1(a): AlexNet, one sample{' on this machine' if options.live else ''}"
    finish(fig, Caption(title=title, claims=claims, notes=notes, plain=options.plain))
    stem = options.out / ("fig1a_live" if options.live else "fig1a")
    files = [write_csv(stem.with_suffix(".csv"), _rows("alexnet", outcomes)), *plots.save(fig, stem)]
    series = [_point("AlexNet", policy, outcome) for policy, outcome in outcomes.items()]
    return FigureResult("fig1a", ONE_SEED, tuple(claims), tuple(series), tuple(files), tuple(notes))


def _fig1a_claims(outcomes: dict[str, Outcome]) -> list[Claim]:
    names = {"device-only": "device", "edge-only": "edge", "cloud-only": "cloud", "deepar": "hybrid"}
    claims = [
        rules.near(f"AlexNet, {names[policy]}", ms, 1e3 * _delay(outcomes[policy]), unit="ms", tolerance=0.01)
        for policy, ms in FIG1A_MS.items()
    ]
    placement = outcomes["deepar"].placement
    assert placement is not None
    cuts = (placement.cut1_name, placement.cut2_name)
    claims.append(rules.is_true("cuts after", ", ".join(FIG1A_CUTS), ", ".join(cuts), cuts == FIG1A_CUTS))
    return claims


def fig3(options: FigureOptions) -> FigureResult:
    """Make Figure 3: VGG, DeepFace and LeNet, each run in four ways."""
    platform = platforms(options.profile)
    outcomes = {
        model: {policy: one_task(platform, model, policy, profile=options.profile) for policy in BARS}
        for model in FIG3_MODELS
    }
    claims: list[Claim] = []
    for model in ("vgg16", "deepface"):
        claims += _fig3_large(FIG3_MODELS[model], {p: _delay(o) for p, o in outcomes[model].items()})
    claims += _fig3_lenet({policy: _delay(outcome) for policy, outcome in outcomes["lenet"].items()})
    claims = rules.as_fitted(claims, "fig3" in platform.fitted_to)
    fig, grid = plots.figure(9.5, 3.5, 1, 3, width_ratios=(1, 1, 1))
    for axes, (model, title) in zip(grid, FIG3_MODELS.items(), strict=True):
        _stacked(axes, ["Device", "Edge", "Cloud", "DeePar"], list(outcomes[model].values()), legend=False)
        axes.set_xlabel(f"{title} ({platform.input_bytes[model] / 1e3:.0f} kB)")
    grid[0].set_ylabel("inference delay (ms)")
    notes = (f"links {platform.link1_bps / 1e6:.1f} and {platform.link2_bps / 1e6:.1f} Mbps; {platform.origin}",)
    title = "Fig. 3: inference delay of various networks, one sample"
    finish(fig, Caption(title=title, claims=claims, notes=notes, plain=options.plain), legend=grid[0])
    stem = options.out / "fig3"
    rows = [row for model in FIG3_MODELS for row in _rows(model, outcomes[model])]
    files = [write_csv(stem.with_suffix(".csv"), rows), *plots.save(fig, stem)]
    series = [_point(FIG3_MODELS[model], policy, outcomes[model][policy]) for model in FIG3_MODELS for policy in BARS]
    return FigureResult("fig3", ONE_SEED, tuple(claims), tuple(series), tuple(files), notes)


def _fig3_large(name: str, delay: dict[str, float]) -> list[Claim]:
    best = all(delay["deepar"] < delay[policy] for policy in BARS[:-1])
    below = 100 * (1 - delay["deepar"] / delay["edge-only"])
    return [
        rules.is_true(f"{name}: DeePar best", "best", "best" if best else "not best", best),
        rules.between(f"{name}: DeePar's delay below edge-only", 10, 30, below),
    ]


def _fig3_lenet(delay: dict[str, float]) -> list[Claim]:
    ratio = delay["deepar"] / delay["cloud-only"]
    others = min(delay["device-only"], delay["edge-only"])
    share = delay["deepar"] / others
    return [
        rules.is_true("LeNet: DeePar equal to cloud-only", "equal", f"ratio {ratio:.3f}", abs(ratio - 1) <= SAME),
        rules.is_true(
            "LeNet: DeePar's delay much lower than device-only and edge-only",
            "much lower",
            f"{100 * (1 - share):.0f} % below the lower of the two",
            share <= FAR_BELOW,
        ),
    ]


def fig1b(options: FigureOptions) -> FigureResult:
    """AlexNet, layer by layer on the edge: delay and output size, the paper's machine (as fitted) and this
    one.
    """
    paper = platforms(options.profile)
    fitted = ", as fitted" if paper.fitted_to else ""
    machines = [(f"the paper's edge{fitted}", paper.model(Role.EDGE, "alexnet"))]
    live = measured(options.progress)
    machines.append(("this machine, measured", live.model(Role.EDGE, "alexnet")))
    fig, grid = plots.figure(10.5, 5.6, 2, 1, squeeze=False)
    claims: list[Claim] = []
    rows: list[dict[str, Any]] = []
    for axes, (where, profile) in zip(grid[:, 0], machines, strict=True):
        _layers(axes, where, profile)
        claims += _fig1b_claims(where, profile)
        rows += [
            {"machine": where, "layer": name, "delay_s": seconds, "output_bytes": size}
            for name, seconds, size in zip(profile.layer_names, profile.layer_s, profile.cut_bytes[1:], strict=True)
        ]
    title = "Fig. 1(b): AlexNet, delay and output size of each layer on the edge"
    unfitted = "; no statement of this figure was used by the fit" if paper.fitted_to else ""
    notes = (f"{paper.origin}{unfitted}",)
    finish(fig, Caption(title=title, claims=claims, notes=notes, plain=options.plain))
    stem = options.out / "fig1b"
    files = [write_csv(stem.with_suffix(".csv"), rows), *plots.save(fig, stem)]
    series = [
        {"x": row["layer"], "policy": row["machine"], "mean_delay_s": row["delay_s"], "ci95_s": 0.0}
        | {"output_bytes": row["output_bytes"]}
        for row in rows
    ]
    return FigureResult("fig1b", ONE_SEED, tuple(claims), tuple(series), tuple(files), notes)


def _layers(axes: Any, where: str, profile: ModelProfile) -> None:
    places = range(profile.layers)
    width = 0.4
    delay = axes.bar(
        [place - width / 2 for place in places], [1e3 * s for s in profile.layer_s], width,
        color=plots.BLUE, label="delay (left axis)",
    )  # fmt: skip
    right = axes.twinx()
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    size = right.bar(
        [place + width / 2 for place in places], [b / 1e3 for b in profile.cut_bytes[1:]], width,
        color=plots.ORANGE, hatch="//", edgecolor="white", linewidth=0.6, label="output size (right axis)",
    )  # fmt: skip
    axes.set_xticks(list(places), profile.layer_names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set(ylabel="delay (ms)", title=where)
    right.set_ylabel("output size (kB)")
    for side in (axes, right):  # leaves room for the legend above the bars
        side.set_ylim(top=1.28 * side.get_ylim()[1])
    axes.legend(handles=[delay, size], loc="upper center", ncols=2, frameon=False)


def _fig1b_claims(where: str, profile: ModelProfile) -> list[Claim]:
    heavy = [s for name, s in zip(profile.layer_names, profile.layer_s, strict=True) if name.startswith(("conv", "fc"))]
    share = 100 * sum(heavy) / sum(profile.layer_s)
    grow = _output_ratios(profile, "conv")
    shrink = _output_ratios(profile, "maxpool")
    grown, shrunk = sum(ratio > 1 for ratio in grow), sum(ratio < 1 for ratio in shrink)
    pool = max(shrink)
    return [
        rules.is_true(f"{where}: conv and fc dominate the delay", "dominate", f"{share:.0f} % of it", share > DOMINATE),
        rules.is_true(
            f"{where}: conv usually grows the output", "usually", f"{grown} of {len(grow)}", 2 * grown > len(grow)
        ),
        rules.is_true(
            f"{where}: max-pool shrinks it significantly",
            "significantly",
            f"{shrunk} of {len(shrink)}, to at most {100 * pool:.0f} %",
            shrunk == len(shrink) and pool < 0.5,
        ),
    ]


def _output_ratios(profile: ModelProfile, prefix: str) -> list[float]:
    return [
        profile.cut_bytes[position] / profile.cut_bytes[position - 1]
        for position, name in enumerate(profile.layer_names, start=1)
        if name.startswith(prefix)
    ]


def _stacked(
    axes: Any,
    names: Sequence[str],
    outcomes: Sequence[Outcome],
    *,
    paper: dict[str, float] | None = None,
    legend: bool = True,
) -> None:
    """Draw one bar per policy, stacked by delay part, with the total on top and the paper's values as diamonds."""
    places = list(range(len(names)))
    bottoms = [0.0] * len(names)
    for part, part_label, colour in zip(DELAY_PARTS, PART_LABELS, PART_COLOURS, strict=True):
        heights = [1e3 * getattr(outcome.predicted, f"{part}_s") for outcome in outcomes]
        axes.bar(
            places, heights, 0.62, bottom=bottoms, label=part_label, color=colour, edgecolor="white", linewidth=0.5
        )
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    top = max(bottoms)
    for place, total in zip(places, bottoms, strict=True):
        axes.text(
            place,
            total + 0.02 * top,
            f"{total:.0f} ms" if total >= 100 else f"{total:.3g} ms",
            ha="center",
            va="bottom",
            fontsize=9,
        )
    if paper is not None:
        axes.scatter(
            [place + 0.39 for place in places], list(paper.values()), marker="D", s=26, color=plots.BLACK,
            label="the paper's value", zorder=3,
        )  # fmt: skip
    axes.set_xticks(places, names)
    axes.set_ylim(0, 1.14 * top)
    if legend:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _delay(outcome: Outcome) -> float:
    assert outcome.delay_s is not None, f"{outcome.task_id} ended {outcome.state} {outcome.cause}"
    return outcome.delay_s


def _point(x: str, policy: str, outcome: Outcome) -> dict[str, Any]:
    return {"x": x, "policy": policy, "mean_delay_s": _delay(outcome), "ci95_s": 0.0}


def _rows(model: str, outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    rows = []
    for policy, outcome in outcomes.items():
        placement, parts = outcome.placement, outcome.predicted
        assert placement is not None
        assert parts is not None
        rows.append(
            {
                "model": model,
                "policy": policy,
                "delay_s": _delay(outcome),
                "kind": placement.kind.value,
                "cut1": placement.cut1_name,
                "cut2": placement.cut2_name,
                **parts.model_dump(),
            }
        )
    return rows
