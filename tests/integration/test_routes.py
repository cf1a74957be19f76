"""Real inference on several routes at once: outputs are bit-identical to those of the whole model, whatever the route."""

from __future__ import annotations

import asyncio

from bus import topics
from bus.messages import Admitted, DatasetInput, Placed, Start, TaskCompleted, TaskSubmitted
from bus.tensors import Array
from bus.values import Execution, Kind, Objective, Parts, Placement, Route
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.models.runtime.litert import SegmentRunner
from stages.zoo.registry import digits, load_model
from tests.model_plans import profile_of
from tests.unit.stages.scripted_region import scripted_region

SAMPLES = 400
LAYER_S = 0.000_5
CUTS = ((1, 3), (0, 0), (2, 7), (0, 7), (4, 4), (7, 7))
"""With all tiers, relayed, ended at the edge, all on the edge, relayed after layers of the device, on the device alone."""


def test_lenet_on_six_routes_gives_the_same_bits_as_the_whole_model() -> None:
    lenet = load_model("lenet")
    layers = lenet.manifest.layers
    profile = profile_of(lenet, LAYER_S)
    runner = LitertRunner([lenet], RunnerOptions(slowdown=1.01), prepared=Prepared(profiles={"lenet": profile}))
    shown: dict[int, list[Array]] = {}

    def show(task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        shown[sample] = outputs

    async def run() -> TaskCompleted:
        async with scripted_region(runner=runner, on_result=show) as region:
            task = TaskSubmitted(
                task_id="t", device="d", model="lenet", samples=SAMPLES, input=DatasetInput(name="digits")
            )
            placed = Placed(
                task_id="t", attempt=1, device="d", model="lenet", sha256=lenet.sha256, samples=SAMPLES, policy="p",
                objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=placement(layers), start_s=0.0,
                wait_s=0.0, delay_s=1.0, parts=Parts(),
            )  # fmt: skip
            await region.decide(Admitted(task=task), placed, Start(task_id="t", attempt=1, device="d", at_s=0.0))
            async with asyncio.timeout(60.0):
                while not region.events():
                    await asyncio.sleep(0.02)
            (completed,) = region.events()
            assert isinstance(completed, TaskCompleted), completed
            taken = {piece.route for one in region.frames(topics.activations_topic("e")) for piece in one.pieces}
            sent = {piece.sample for one in region.frames(topics.activations_topic("e")) for piece in one.pieces}
            assert taken == {0, 1, 2, 3, 4}
            assert len(sent) < SAMPLES, "the device computed no sample alone"
            return completed

    completed = asyncio.run(run())
    whole = SegmentRunner(lenet.source)
    images, _ = digits()
    for sample in range(SAMPLES):
        (expected,) = whole.run([images[sample % len(images)][None]])
        (output,) = shown[sample]
        assert output.dtype == expected.dtype
        assert output.tobytes() == expected.tobytes(), f"sample {sample} differs"
    assert completed.measured.device_s > 0


def placement(layers: int) -> Placement:
    """Six routes with equal shares."""
    assert layers == 7
    return Placement(
        kind=Kind.DEVICE_EDGE_CLOUD, edge="e", cut1=1, cut2=3, cut1_name="a", cut2_name="b", link1_bps=40_000_000,
        link2_bps=20_000_000,
        routes=tuple(
            Route(
                cut1=cut1, cut2=cut2, share=1 / len(CUTS),
                stations_s=(
                    cut1 * LAYER_S, 0.001, (cut2 - cut1) * LAYER_S, 0.001, (layers - cut2) * LAYER_S, 0.0001, 0.0001,
                ),
            )
            for cut1, cut2 in CUTS
        ),
    )  # fmt: skip
