"""Fit of the `paper` profile: speeds of device, edge and cloud that reproduce the paper's figures.

The paper gives no layer times. The fit assumes a roofline-like cost of a layer on each platform,

    milliseconds = a (million MACs) + b (MB of weights) + c (MB of activations read and written) + d,

which makes twelve coefficients, plus b1, b2 and AlexNet's input size. They are fitted to these statements together:

* Fig. 1(a): AlexNet takes 84, 64, 314 ms on the device, the edge, the cloud, and 43 ms cut after `maxpool_1` and `maxpool_3`,
  which are the best of all cuts;
* Fig. 3: DeePar is best for VGG and DeepFace, 10-30 % below edge-only; for LeNet it equals cloud-only, far below the others;
* Fig. 4: the reductions that it states, for tasks drawn as the paper describes, with one random reachable edge per device;
* no coefficient is larger on a platform that the paper calls more powerful: work costs the cloud no more than the edge, and
  the edge no more than the device.

Differential evolution first fits Figures 1 and 3 and non-overlapping tasks of Fig. 4 (closed form). A random descent then
includes Fig. 4 itself, simulated with `PlannerCore`. All random values come from fixed seeds, so the same numpy and scipy
give the same file; it takes some minutes. Two statements of Fig. 4 contradict each other: "about 20 %" below edge-only in
(a) and "about 40 %" in (c). (c) has four times the edges and a sixth of the time, nearly the same load, so both results are
nearly the same. The fit uses (c). `python -m loadgen.experiments.fit_paper planner/data/paper.json` writes the shipped
file.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import differential_evolution, minimize

from bus.messages import NodeAnnounced, SeedInput, Start, TaskCompleted, TaskSubmitted
from bus.values import BITS_PER_BYTE, ModelProfile, Parts, Role
from loadgen.experiments.paper_networks import TABLES
from planner.core.core import PlannerCore

Vector = npt.NDArray[np.float64]

SEED: Final = 20181
TIERS: Final = ("device", "edge", "cloud")
PICTURE_BYTES: Final = {"vgg16": 200_000, "deepface": 200_000, "lenet": 1_000}
"""Input sizes of Fig. 3, from the paper; AlexNet's is fitted."""
DEVICES: Final = (20, 40, 60, 80)
SETTINGS: Final = {"4a": (10, 300.0), "4b": (10, 50.0), "4c": (40, 50.0)}
FITTED_TO: Final = ("fig1a", "fig3", "fig4a", "fig4b", "fig4c")
"""Figures whose statements the fit uses; their verdicts are marked as fitted."""
FIGURE_4_SEEDS: Final = (1, 2, 3)
"""Seeds of the fit; no verdict uses them."""
STARTS: Final = 3
DESCENT_STEPS: Final = 25
LONE_TASKS: Final = 48
LONE_TARGETS: Final = (81.5, 32.0, 68.0)
"""Percent below device-only (at least), edge-only (about) and cloud-only (at least) for tasks that do not overlap."""

# of a, b, c, d (ms per million MACs, per MB, per MB, per layer) on each tier, then b1, b2 (bit/s), AlexNet's input (bytes)
LOWEST: Final = np.log([1e-4, 1e-3, 1e-2, 1e-3] * 3 + [50e6, 8e6, 100e3])
HIGHEST: Final = np.log([0.3, 1.0, 8.0, 4.0] * 3 + [500e6, 50e6, 1200e3])

_FEATURES: Final = {
    name: np.array(
        [
            [layer.macs / 1e6, layer.weight_bytes / 1e6, (layer.input_bytes + layer.output_bytes) / 1e6, 1.0]
            for layer in table.layers
        ]
    )
    for name, table in TABLES.items()
}
_SIZES: Final = {
    name: np.array([table.input_bytes, *(layer.output_bytes for layer in table.layers)], dtype=np.float64)
    for name, table in TABLES.items()
}


def delays_ms(fit: Vector, model: str) -> Vector:
    """Delay of one sample for every pair of cuts, [cut1, cut2], infinite below the diagonal."""
    values = np.exp(fit)
    f_d, f_e, f_c = (
        np.concatenate([[0.0], np.cumsum(_FEATURES[model] @ values[4 * tier : 4 * tier + 4])]) for tier in range(3)
    )
    size = _SIZES[model].copy()
    size[0] = PICTURE_BYTES.get(model, values[14])
    last = len(size) - 1
    x1, x2 = BITS_PER_BYTE * 1e3 / values[12], BITS_PER_BYTE * 1e3 / values[13]
    first = f_d + size * x1 - f_e
    found = first[:, None] + (f_e + f_c[last] - f_c + size * x2)[None, :] + size[last] * (x1 + x2)
    found[:, last] = first + f_e[last] + size[last] * x1
    found[last, last] = f_d[last]
    cuts = np.arange(last + 1)
    return np.where(cuts[:, None] <= cuts[None, :], found, np.inf)


def _over(amount: float) -> float:
    return max(0.0, amount) ** 2


def single_task_loss(fit: Vector) -> float:
    """Loss for Figures 1(a) and 3 and the order of the platforms; 0 if all statements hold with a margin."""
    found = delays_ms(fit, "alexnet")
    cut1, cut2 = (1 + [layer.name for layer in TABLES["alexnet"].layers].index(n) for n in ("maxpool_1", "maxpool_3"))
    best = found[cut1, cut2]
    loss = 100.0 * sum((got / want - 1) ** 2 for got, want in _alexnet_pairs(found, best))
    found[cut1, cut2] = np.inf
    loss += 100.0 * _over((best + 1.0 - found.min()) / 43)
    for model in ("vgg16", "deepface"):
        found = delays_ms(fit, model)
        share = found.min() / found[0, -1]
        loss += 20 * (_over(share - 0.87) + _over(0.73 - share))
        loss += 10 * (_over(found.min() / found[-1, -1] - 0.9) + _over(found.min() / found[0, 0] - 0.9))
    found = delays_ms(fit, "lenet")
    loss += 2000 * _over(found[0, 0] / found.min() - 1)
    loss += 10 * (_over(found[0, 0] / found[-1, -1] - 0.55) + _over(found[0, 0] / found[0, -1] - 0.55))
    device, edge, cloud = fit[0:4], fit[4:8], fit[8:12]
    for slower, faster in ((device, edge), (edge, cloud)):
        loss += 0.1 * float(np.sum(np.maximum(0.0, faster - slower) ** 2))
    return float(loss)


def _alexnet_pairs(found: Vector, best: float) -> list[tuple[float, float]]:
    return [(found[-1, -1], 84.0), (found[0, -1], 64.0), (found[0, 0], 314.0), (best, 43.0)]


# --- Fig. 4 ------------------------------------------------------------------------------------------------------


def profiles(fit: Vector) -> dict[str, dict[str, ModelProfile]]:
    """Tier -> model -> profile. There is no model file, so the hash is that of the name."""
    values = np.exp(fit)
    found: dict[str, dict[str, ModelProfile]] = {}
    for tier, name in enumerate(TIERS):
        found[name] = {}
        for model, table in TABLES.items():
            layer_ms = _FEATURES[model] @ values[4 * tier : 4 * tier + 4]
            found[name][model] = ModelProfile(
                model=model,
                sha256=hashlib.sha256(f"paper/{model}".encode()).hexdigest(),
                platform=f"paper/{name}",
                layer_names=tuple(layer.name for layer in table.layers),
                layer_s=tuple(round(float(ms) * 1e-3, 12) for ms in layer_ms),
                cut_bytes=tuple(int(size) for size in _SIZES[model]),
            )
    return found


def mean_delay_s(
    rows: dict[str, dict[str, ModelProfile]], policy: str, edges: int, within_s: float, devices: int, seed: int
) -> float:
    """Mean of wait + delay in Fig. 4: the paper's tasks, one per device, one random reachable edge each."""
    rng = random.Random(f"{edges} {within_s} {devices} {seed}")
    core = PlannerCore(0, policy)
    core.handle(_node("cloud", Role.CLOUD, rows["cloud"]), 0.0)
    for i in range(edges):
        capacities = {
            "slots": rng.randint(1, 10),
            "link1_capacity_bps": int(rng.uniform(5e9, 20e9)),
            "link2_capacity_bps": int(rng.uniform(0.1e9, 5e9)),
        }
        core.handle(_node(f"e{i}", Role.EDGE, rows["edge"], **capacities), 0.0)
    heap: list[tuple[float, int, str, Any]] = []
    for i in range(devices):
        name = f"d{i}"
        core.handle(_node(name, Role.DEVICE, rows["device"], reachable_edges=(f"e{rng.randrange(edges)}",)), 0.0)
        task = TaskSubmitted(
            task_id=f"t{i}",
            device=name,
            model=rng.choice(list(TABLES)),
            samples=rng.randint(1, 1000),
            input=SeedInput(seed=i),
            max_link1_bps=int(rng.uniform(20e6, 300e6)),
            max_link2_bps=int(rng.uniform(10e6, 50e6)),
            input_bytes=rng.randint(10_000, 1_000_000),
        )
        heapq.heappush(heap, (rng.uniform(0.0, within_s), 1, name, task))
    total = 0.0
    while heap:
        now, _, _, event = heapq.heappop(heap)
        total += -now if isinstance(event, TaskSubmitted) else now
        for change in core.handle(event, now):
            if isinstance(change, Start):
                end_s = core.ledger.reservations[change.task_id].end_s
                done = TaskCompleted(
                    task_id=change.task_id, attempt=1, node=change.device, measured=Parts(), delay_s=end_s - now
                )
                heapq.heappush(heap, (end_s, 0, change.device, done))
    return total / devices


def _node(name: str, role: Role, models: dict[str, ModelProfile], **values: Any) -> NodeAnnounced:
    return NodeAnnounced(node=name, role=role, incarnation="i", lease_s=1e9, models=tuple(models.values()), **values)


def reductions(fit: Vector) -> dict[str, dict[str, list[float]]]:
    """Setting -> policy -> percent by which DeePar is below it, at each number of devices."""
    rows = profiles(fit)
    found: dict[str, dict[str, list[float]]] = {}
    for setting, (edges, within_s) in SETTINGS.items():
        means = {
            policy: [
                sum(mean_delay_s(rows, policy, edges, within_s, devices, seed) for seed in FIGURE_4_SEEDS)
                for devices in DEVICES
            ]
            for policy in ("deepar", "device-only", "edge-only", "cloud-only")
        }
        found[setting] = {
            policy: [100 * (1 - ours / theirs) for ours, theirs in zip(means["deepar"], means[policy], strict=True)]
            for policy in ("device-only", "edge-only", "cloud-only")
        }
    return found


def many_task_loss(fit: Vector) -> float:
    """Loss for the statements about Fig. 4; 0 if all hold with a margin of two points."""
    found = reductions(fit)

    def mean(setting: str, policy: str) -> float:
        return float(np.mean(found[setting][policy]))

    loss = 0.0
    for got, want in (
        (mean("4b", "cloud-only"), 70.0),
        (mean("4c", "device-only"), 80.0),
        (mean("4c", "edge-only"), 40.0),
    ):
        loss += _over((abs(got - want) - 2.5) / 10)
    for policy in ("device-only", "cloud-only"):
        loss += _over((63.0 - mean("4a", policy)) / 10)
    return loss + 0.02 * _over((mean("4a", "edge-only") - 22.0) / 10)


# --- the fit -----------------------------------------------------------------------------------------------------


def lone_reductions(fit: Vector) -> Vector:
    """Percent by which DeePar is below device-only, edge-only and cloud-only for Fig. 4's tasks, each running alone."""
    rng = np.random.default_rng(SEED)
    values = np.exp(fit)
    totals = np.zeros(4)
    for model, size in _SIZES.items():
        samples = rng.integers(1, 1001, LONE_TASKS)
        x1 = BITS_PER_BYTE * 1e3 / rng.uniform(20e6, 300e6, LONE_TASKS)[:, None]
        x2 = BITS_PER_BYTE * 1e3 / rng.uniform(10e6, 50e6, LONE_TASKS)[:, None]
        sizes = np.tile(size, (LONE_TASKS, 1))
        sizes[:, 0] = rng.uniform(10e3, 1e6, LONE_TASKS)
        f_d, f_e, f_c = (
            np.concatenate([[0.0], np.cumsum(_FEATURES[model] @ values[4 * tier : 4 * tier + 4])]) for tier in range(3)
        )
        last = len(size) - 1
        first = f_d - f_e + sizes * x1
        second = f_e + f_c[last] - f_c + sizes * x2
        result1, result2 = size[last] * x1[:, 0], size[last] * x2[:, 0]
        to_edge = first[:, :last].min(axis=1) + f_e[last] + result1
        further = np.minimum.accumulate(first[:, :last], axis=1) + second[:, :last]
        to_cloud = further.min(axis=1) + result1 + result2
        alone = np.full(LONE_TASKS, f_d[last])
        edge = first[:, 0] + f_e[last] + result1
        cloud = first[:, 0] + second[:, 0] + result1 + result2
        best = np.minimum(alone, np.minimum(to_edge, to_cloud))
        totals += [float((samples * delay).sum()) for delay in (best, alone, edge, cloud)]
    return np.asarray(100 * (1 - totals[0] / totals[1:]))


def closed_form_loss(fit: Vector) -> float:
    """Loss for Figures 1 and 3, and for the part of Fig. 4 that needs no simulation."""
    device, edge, cloud = lone_reductions(fit)
    wanted_device, wanted_edge, wanted_cloud = LONE_TARGETS
    beside = _over((wanted_device - device) / 10) + _over((wanted_cloud - cloud) / 10)
    beside += _over((abs(edge - wanted_edge) - 1) / 10)
    return single_task_loss(fit) + 0.02 * beside


def _descend(loss: Callable[[Vector], float], fit: Vector, steps: int) -> Vector:
    bounds = list(zip(LOWEST, HIGHEST, strict=True))
    found = minimize(loss, fit, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
    return np.asarray(found.x, dtype=np.float64)


def whole_loss(fit: Vector) -> float:
    """Loss for all three figures. Fig. 4 is simulated only if Figures 1 and 3 hold."""
    single = single_task_loss(fit)
    return 50 * single + (many_task_loss(fit) if single < 2e-3 else 100.0)


def fit(say: Callable[[str], None] = lambda text: None) -> Vector:
    """The fit: logarithms of all fifteen values."""
    bounds = list(zip(LOWEST, HIGHEST, strict=True))
    best, best_loss = LOWEST, float("inf")
    for start in range(STARTS):
        seed = SEED + start
        found = differential_evolution(
            closed_form_loss, bounds, seed=seed, maxiter=110, popsize=6, tol=1e-9, polish=False
        )
        trial = _descend(closed_form_loss, np.asarray(found.x, dtype=np.float64), 60)
        loss = whole_loss(trial)
        say(f"start {start}: {loss:.4f} (figures 1 and 3: {single_task_loss(trial):.2e})")
        if loss < best_loss:
            best, best_loss = trial, loss
    rng = np.random.default_rng(SEED)
    for count in range(DESCENT_STEPS):
        scale = (0.02, 0.06, 0.15)[count % 3]
        trial = np.clip(best + scale * rng.standard_normal(len(best)), LOWEST, HIGHEST)
        trial = _descend(single_task_loss, trial, 100)
        loss = whole_loss(trial)
        if loss < best_loss:
            best, best_loss = trial, loss
            say(f"step {count}: {best_loss:.4f} (figures 1 and 3: {single_task_loss(best):.2e})")
    return _descend(single_task_loss, best, 200)


def document(found: Vector) -> dict[str, Any]:
    """Content of the profile file."""
    values = [float(value) for value in np.exp(found)]
    rows = profiles(found)
    return {
        "version": 1,
        "name": "paper",
        "origin": "fitted by loadgen/experiments/fit_paper.py to Figures 1(a), 3 and 4 of the paper, not measured",
        "fitted_to": list(FITTED_TO),
        "fit_seeds": list(FIGURE_4_SEEDS),
        "seed": SEED,
        "coefficients_ms": {
            tier: dict(
                zip(("per_million_macs", "per_mb_weights", "per_mb_activations", "per_layer"), part, strict=True)
            )
            for tier, part in zip(TIERS, (values[0:4], values[4:8], values[8:12]), strict=True)
        },
        "link1_bps": round(values[12]),
        "link2_bps": round(values[13]),
        "input_bytes": {"alexnet": round(values[14]), **PICTURE_BYTES},
        **{tier: [rows[tier][model].model_dump(mode="json") for model in TABLES] for tier in TIERS},
    }


def main(path: str) -> None:
    """Run the fit and write the profile file."""
    found = fit(lambda text: print(text, file=sys.stderr, flush=True))
    for setting, policies in reductions(found).items():
        means = ", ".join(f"{policy} {np.mean(values):.1f}" for policy, values in policies.items())
        print(f"Fig. {setting}, DeePar below: {means} %", file=sys.stderr)
    Path(path).write_text(json.dumps(document(found), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
