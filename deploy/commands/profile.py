"""`deepar profile`: measured time of every layer of a model on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bus.errors import ConfigError
from bus.values import ModelProfile
from deploy.console_output.measurement_tables import (
    agreement_line,
    batch_rows,
    batches_table,
    codecs_report,
    codecs_table,
)
from deploy.console_output.model_loading import (
    FileOptions,
    Json,
    ModelArgument,
    load,
    print_json,
    progress_bar,
)
from deploy.console_output.model_tables import gpu_line, profile_table
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import GpuTolerance, Processor
from deploy.console_output.profile_chart import draw_profile
from deploy.services.telemetry.log_setup import configure_logging
from stages.calibration.batch_times import MeasuredBatches, measure_and_store_batches
from stages.calibration.measurement import MeasuredCodecs
from stages.calibration.samples import Calibration, calibration_of
from stages.calibration.stored import measure_and_store
from stages.models.compute_options import parse_threads
from stages.models.files.cache import write_whole
from stages.models.gpu.accelerator import AcceleratorOptions, accelerated
from stages.models.model import Model
from stages.models.profiler import ProfileCache, TimedRuns, measure_steadily, measuring_alone
from stages.models.thread_count import machine_threads
from stages.zoo.networks import LENET

MOST_THREADS = 64
"""Largest value of --num-threads."""


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """How layers are timed."""

    num_threads: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Number of threads for one inference, at most 64; auto takes the fewest that are about as fast as any.",
        ),
    ] = "1"
    num_runs: Annotated[int, typer.Option(min=1, help="Timed runs of the whole and of every layer.")] = 10
    warmup_runs: Annotated[int, typer.Option(min=0, help="Untimed runs before the timed ones.")] = 2


@dataclass(frozen=True, kw_only=True)
class CodecOptions:
    """Whether codecs are measured, and with which inputs."""

    codecs: Annotated[
        bool,
        typer.Option("--codecs", help="Measure codecs at every cut as well: size, speed, agreement of the outputs."),
    ] = False
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            dir_okay=False,
            help="Real inputs for --codecs: an array for each input, whose first dimension counts samples; an array "
            "labels says that the outputs are classes. Default for lenet: the supplied digits.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Whether batches are measured."""

    batches: Annotated[
        bool,
        typer.Option(
            "--batches",
            help="Measure every layer in batches of 2 to 32 samples as well: speed, and whether the results stay the same.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """Whether the GPU is measured."""

    accelerator: Annotated[
        Processor,
        typer.Option(
            help="Processor to measure: cpu, or gpu (only if the results of the whole model agree with the CPU's)."
        ),
    ] = Processor.CPU
    gpu_tolerance: GpuTolerance = 1e-4


@dataclass(frozen=True, kw_only=True)
class ProfileOutput:
    """Where a profile is written, and its name."""

    out: Annotated[
        Path | None,
        typer.Option(help="Write the profile to this JSON file, and a chart beside it.", dir_okay=False),
    ] = None
    chart: Annotated[
        Path | None, typer.Option(help="Write a bar chart to this file (.png, .svg or .pdf).", dir_okay=False)
    ] = None
    platform: Annotated[str, typer.Option(help="Name of this machine in the profile.")] = "this machine"


@with_option_groups
def profile(
    model: ModelArgument,
    timing: TimingOptions,
    coding: CodecOptions,
    batching: BatchOptions,
    gpu: GpuOptions,
    output: ProfileOutput,
    as_json: Json = False,
    *,
    file: FileOptions,
) -> None:
    """Measure the time and output size of every layer of a model on this machine.

    Each layer is timed as a separate slice, then the layer times are scaled to add up to the time of the whole model.
    The measurement is repeated until both agree within 25 %, at most five times. Stages on this machine use the result,
    and announce the measured codecs and batches. On a GPU the whole model is timed, and the layers share that time as on
    the CPU.

    Example: `deepar profile lenet --num-threads 2 --out here.json`
    """
    if coding.calibration is not None and not coding.codecs:
        raise ConfigError("--calibration has no effect without --codecs", remedy="add --codecs")
    wanted = parse_threads(timing.num_threads, most=MOST_THREADS)
    loaded = load(model, file)
    calibration = calibration_of(loaded, coding.calibration) if coding.codecs else None
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        log.print(line, style="yellow", markup=False)

    num_threads = machine_threads(loaded, remeasure=True, say=say) if wanted == "auto" else wanted
    with measuring_alone(say), progress_bar(f"profiling {loaded.name}") as bar:
        found = measure_steadily(
            loaded,
            TimedRuns(num_threads=num_threads, num_runs=timing.num_runs, warmup_runs=timing.warmup_runs),
            step=lambda what, done, total: bar(done, total, what),
            say=say,
        )
        ProfileCache().store(found, num_threads=num_threads, say=say)
        coded = None if calibration is None else _measured_codecs(loaded, calibration, bar, say)
        together = _measured_batches(loaded, num_threads, bar, say) if batching.batches else None
    profiled = found.profile(output.platform)
    if coded is not None:
        profiled = coded.added_to(profiled)
    if together is not None:
        profiled = together.added_to(profiled, "exact", num_threads)
    if gpu.accelerator is Processor.GPU:
        profiled = _on_gpu(profiled, loaded, gpu.gpu_tolerance)
    out = output.out
    if out is not None:
        write_whole(out.absolute(), [profiled.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"])
    chart = output.chart or (out.with_suffix(".png") if out is not None else None)
    if chart is not None:
        draw_profile(found, profiled, chart)
    if not as_json:
        console = Console(emoji=False)
        console.print(profile_table(found, profiled, console.width))
        if coded is not None:
            console.print(codecs_table(loaded, coded))
            console.print(agreement_line(coded), soft_wrap=True, markup=False, highlight=False)
        if together is not None:
            console.print(batches_table(loaded, together))
        if gpu.accelerator is Processor.GPU:
            console.print(gpu_line(profiled), soft_wrap=True, markup=False, highlight=False)
        for path in filter(None, (out, chart)):
            console.print(f"written: {path}")
        return
    rows: list[dict[str, Any]] = [
        {
            "position": layer.position,
            "name": layer.name,
            "kind": layer.kind,
            "median_s": layer.median_s,
            "spread_s": layer.spread_s,
            "output_bytes": layer.output_bytes,
            "scaled_s": profiled.layer_s[layer.position - 1],
            "cut_bytes": profiled.cut_bytes[layer.position],
        }
        for layer in found.layers
    ]
    print_json(
        {
            "model": loaded.name,
            "platform": output.platform,
            "whole_s": found.whole_s,
            "sum_of_slices_s": found.sum_of_slices_s,
            "agrees": found.agrees,
            "layers": rows,
            "num_threads": num_threads,
            "num_runs": timing.num_runs,
            "files": [str(path) for path in (out, chart) if path is not None],
        }
        | ({} if coded is None else codecs_report(loaded, coded))
        | ({} if together is None else {"batches": batch_rows(loaded, together), "executors": profiled.executors})
        | ({} if gpu.accelerator is Processor.CPU else {"gpu": _gpu_report(profiled)})
    )


def _on_gpu(profiled: ModelProfile, model: Model, tolerance: float) -> ModelProfile:
    configure_logging("error")  # the output has the reason that the log would give
    with accelerated(model, AcceleratorOptions(tolerance=tolerance)) as (store, accelerator):
        return accelerator.profile(profiled, store)


def _gpu_report(profiled: ModelProfile) -> dict[str, Any]:
    used = profiled.accelerator == "gpu"
    sizes = [speed.batch for speed in profiled.batch or ()] if used else []
    return {
        "whole_s": profiled.whole_s if used else None,
        "batches": [{"batch": size, "batch_s": profiled.together_s(size, 0, profiled.layers)} for size in sizes],
        "reason": profiled.not_on_gpu or "",
    }


def _measured_codecs(
    model: Model, calibration: Calibration, bar: Callable[[int, int, str], None], say: Callable[[str], None]
) -> MeasuredCodecs:
    if model.trusted and model.name != LENET.name:
        say(f"{model.name} has random weights: its ratios and agreements say nothing about a trained network")
    return measure_and_store(
        model, calibration, step=lambda what, done, total: bar(done, total, f"codecs: {what}"), say=say
    )


def _measured_batches(
    model: Model, num_threads: int, bar: Callable[[int, int, str], None], say: Callable[[str], None]
) -> MeasuredBatches:
    return measure_and_store_batches(
        model, num_threads, step=lambda what, done, total: bar(done, total, f"batches: {what}"), say=say
    )
