"""A rehearsal: a stage runs a model in memory, as a task would."""

from __future__ import annotations

import contextlib

from bus.errors import ConfigError
from bus.frames import AttemptPlan, Frame, decode_frame, encode_frame
from bus.messages import DatasetInput, SeedInput, TaskSubmitted
from bus.tensors import Assembler, to_pieces
from bus.values import Execution, Kind, ModelProfile, Placement
from stages.measuring.clock import exact_clock
from stages.runner import PaceClock, Runner

FRAME_BYTES = 1 << 16
"""Limit for the data of the frame that a rehearsal packs and unpacks."""


async def rehearse(runner: Runner, profile: ModelProfile, *, packs: bool = False) -> float:
    """Run the whole model once in memory, as a task would; returns how long computing took, in seconds.

    The first run in a process also pays for what is done only once: late imports, data sets, threads and fresh memory. With
    `packs` it also reads a data set that fits the model, and packs and unpacks the input as a frame.
    """
    layers, name = profile.layers, profile.model
    whole = Placement(kind=Kind.DEVICE, cut1=layers, cut2=layers, cut1_name="", cut2_name="")
    plan = AttemptPlan(
        task_id="rehearsal", attempt=1, region=0, device="rehearsal", model=name, sha256=profile.sha256,
        samples=1, todo=1, execution=Execution.STREAMING, placement=whole,
    )  # fmt: skip
    task = TaskSubmitted(task_id=plan.task_id, device=plan.device, model=name, samples=1, input=SeedInput(seed=0))
    inputs = runner.open_input(task)(0)
    if packs:
        with contextlib.suppress(ConfigError):  # the data set does not fit
            runner.open_input(task.model_copy(update={"input": DatasetInput(name="digits")}))(0)
        pieces = tuple(to_pieces(0, inputs, FRAME_BYTES)[:1])
        payload = encode_frame(Frame("activations", plan.task_id, plan.attempt, plan.device, pieces, plan))
        Assembler().add(decode_frame(payload).pieces[0])
    await runner.prepare(plan, 0, layers)
    station = runner.station(plan, 0, layers, PaceClock())
    try:
        begin_s = exact_clock()()
        await station.run(0, inputs, begin_s)
        return exact_clock()() - begin_s
    finally:
        station.close()
