"""`deepar models` and `deepar profile`: inspection, cutting, verification and profiling of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from bus.errors import ConfigError, CutError, unknown_name
from bus.tensors import Array
from deploy.commands.profile import profile
from deploy.console_output.model_loading import (
    FileOptions,
    Json,
    ModelArgument,
    Threads,
    load,
    print_json,
    progress_bar,
)
from deploy.console_output.model_tables import (
    cuts_table,
    gpu_lines,
    models_table,
    parts_table,
    show_tree,
    size,
    verify_lines,
)
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import GpuTolerance, Processor
from deploy.console_output.writable import writable_folder
from deploy.services.process import EXIT_FAILED
from deploy.services.telemetry.log_setup import configure_logging
from stages.models.cuts import even_cuts, useful_positions, work_shares
from stages.models.files.arrays import stored_arrays
from stages.models.files.cache import write_whole
from stages.models.gpu.accelerator import AcceleratorOptions, accelerated
from stages.models.gpu.verdicts import Verdict, verify_on_gpu
from stages.models.model import Model
from stages.models.runtime.litert import InterpreterOptions
from stages.models.slicer import position_of, write_parts
from stages.models.verify import Report, named_inputs, pairs_of, random_inputs
from stages.models.verify import verify as verify_parts
from stages.zoo.networks import NETWORKS, trained
from stages.zoo.networks import build as build_network
from stages.zoo.registry import list_models

__all__ = ["app", "profile"]

app = typer.Typer(
    no_args_is_help=True, help="List, show, cut and verify models. MODEL is a zoo name or a .tflite file."
)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the models that DeePar includes. Models with seeded weights are generated on first use.

    Example: `deepar models list`
    """
    entries = list_models()
    if as_json:
        print_json({"models": [_entry(entry) for entry in entries]})
    else:
        Console(emoji=False).print(models_table(entries))


@app.command()
@with_option_groups
def show(
    model: ModelArgument,
    as_json: Json = False,
    *,
    file: FileOptions,
) -> None:
    """Show the inputs, outputs and layers of a model.

    Example: `deepar models show alexnet`
    """
    loaded = load(model, file)
    if as_json:
        manifest = loaded.manifest
        print_json(
            {
                "model": loaded.name,
                "path": str(loaded.path),
                "sha256": loaded.file_sha256,
                "size_bytes": loaded.size_bytes,
                "layers": manifest.layers,
                "inputs": [spec.model_dump(mode="json") for spec in manifest.cuts[0].tensors],
                "outputs": [spec.model_dump(mode="json") for spec in manifest.cuts[-1].tensors],
                "work": sum(cut.work for cut in manifest.cuts),
                "stateful": loaded.graph.stateful,
                "carried_operators": len(loaded.graph.carried),
                "missing_kernels": sorted(loaded.facts.missing_kernels),
                "kinds": _counted(layer.kind for layer in loaded.graph.layers),
                "uncuttable": _uncuttable(loaded),
                "signature": loaded.contents.meant,
                "signatures": [asdict(one) for one in loaded.contents.signatures],
                "unseen": list(loaded.contents.unseen),
                "open_inputs": [asdict(one) for one in loaded.contents.open_inputs],
            }
        )
    else:
        Console(emoji=False).print(show_tree(loaded))


@app.command()
@with_option_groups
def cuts(
    model: ModelArgument,
    as_json: Json = False,
    useful: Annotated[
        bool, typer.Option("--useful", help="Show only Pareto-optimal cuts (work before the cut, bytes crossing it).")
    ] = False,
    *,
    file: FileOptions,
) -> None:
    """List the possible cuts of a model, with the tensors that cross and the work before each.

    Example: `deepar models cuts alexnet --useful`
    """
    loaded = load(model, file)
    manifest = loaded.manifest
    front, shares = set(useful_positions(manifest)), work_shares(manifest)
    shown = [cut for cut in manifest.cuts if not useful or cut.position in front]
    if not as_json:
        Console(emoji=False).print(cuts_table(loaded, shown, front, shares))
        return
    print_json(
        {
            "model": loaded.name,
            "layers": manifest.layers,
            "cuts": [
                {
                    "position": cut.position,
                    "name": cut.name,
                    "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in cut.tensors],
                    "cut_bytes": cut.cut_bytes,
                    "work_share": shares[cut.position],
                    "useful": cut.position in front,
                    "cuttable": cut.cuttable,
                    "reason": cut.reason or None,
                }
                for cut in shown
            ],
        }
    )


@app.command("slice")
@with_option_groups
def slice_(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder for the parts and manifest.json.", file_okay=False)],
    cut1: Annotated[
        str | None,
        typer.Option(metavar="NAME|N", help="Last layer on the device: a name or a position. [default: even work]"),
    ] = None,
    cut2: Annotated[
        str | None, typer.Option(metavar="NAME|N", help="Last layer on the edge; without it the cloud runs the rest.")
    ] = None,
    as_json: Json = False,
    *,
    file: FileOptions,
) -> None:
    """Cut a model into valid .tflite parts, for the device, the edge and the cloud.

    Without cuts, the three parts get about the same work.

    Example: `deepar models slice alexnet --cut1 maxpool_1 --cut2 maxpool_3 --out parts`
    """
    loaded = load(model, file)
    first, second = _asked_cuts(loaded, cut1, cut2)
    manifest, parts = write_parts(loaded, [first, second], writable_folder("--out", out))
    if as_json:
        kept = ("role", "file", "first", "last", "size_bytes", "sha256")
        print_json({"manifest": str(manifest), "parts": [{key: part[key] for key in kept} for part in parts]})
    else:
        Console(emoji=False).print(parts_table(loaded, manifest, parts))


@app.command()
def build(
    network: Annotated[str, typer.Argument(help="Network layout: lenet, alexnet, vgg16, deepface or mobilenet.")],
    weights: Annotated[
        Path, typer.Option(help="Weights: an .npz file with LAYER/kernel and LAYER/bias.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Output file (.tflite).", dir_okay=False)],
    as_json: Json = False,
) -> None:
    """Write a network of the zoo with your own weights.

    Kernels are float32 in TensorFlow Lite's order: (filters, height, width, channels) for convolutions, (outputs, inputs) for
    fully-connected layers, whose inputs are counted row by row, channels last.

    Example: `deepar models build lenet --weights mine.npz --out mine.tflite`
    """
    if network not in NETWORKS:
        raise unknown_name("network", network, NETWORKS)
    with stored_arrays(weights) as stored, progress_bar(f"writing {out.name}") as bar:
        graph = build_network(NETWORKS[network], trained(stored, NETWORKS[network]))
        digest = write_whole(
            out.absolute(),
            graph.chunks(),
            size_bytes=graph.size_bytes,
            progress=lambda what, done, total: bar(done, total, ""),
        )
    if as_json:
        print_json({"network": network, "file": str(out), "sha256": digest, "size_bytes": out.stat().st_size})
    else:
        Console(emoji=False).print(f"written: {out}, {size(out.stat().st_size)}, SHA-256 {digest}")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The cuts, inputs and runtime of a verification."""

    cuts: Annotated[
        str,
        typer.Option(
            metavar="all|single|N",
            help="Cuts to verify: all pairs, every position once, or the latter plus N random pairs.",
        ),
    ] = "60"
    inputs: Annotated[
        Path | None,
        typer.Option(help="Inputs: an .npz file with an array for each input.", exists=True, dir_okay=False),
    ] = None
    samples: Annotated[int, typer.Option(min=0, help="Number of random samples to run besides the given inputs.")] = 1
    seed: Annotated[int, typer.Option(min=0, help="Random seed for pairs and samples.")] = 0
    num_threads: Threads = 1
    delegate: Annotated[bool, typer.Option(help="Use the runtime's default delegate (XNNPACK).")] = True
    accelerator: Annotated[
        Processor,
        typer.Option(help="cpu: compare the parts with the whole bit by bit; gpu: also compare each with the CPU."),
    ] = Processor.CPU
    gpu_tolerance: GpuTolerance = 1e-4


@app.command()
@with_option_groups
def verify(
    model: ModelArgument,
    how: VerifyOptions,
    as_json: Json = False,
    *,
    file: FileOptions,
) -> None:
    """Run the whole model and its parts on the same inputs and compare the results bit by bit.

    Exit code 0 if all results are identical, or if every difference is proven to come from the runtime; otherwise 1.
    With `--accelerator gpu`, also 1 if a part's results on the GPU are wrong or the GPU cannot compute it.

    Example: `deepar models verify lenet --cuts all`
    """
    loaded = load(model, file)
    rng = np.random.default_rng(how.seed)
    given = _given(loaded, how.inputs) if how.inputs is not None else []
    chosen = [*given, *(random_inputs(loaded, rng) for _ in range(how.samples))]
    if not chosen:
        raise ConfigError("no inputs to run: --samples 0 needs --inputs")
    pairs = pairs_of(loaded, how.cuts, how.seed)
    verdicts = None
    with progress_bar(f"verifying {loaded.name}") as bar:
        report = verify_parts(
            loaded,
            pairs,
            chosen,
            InterpreterOptions(num_threads=how.num_threads, delegate=how.delegate),
            step=lambda done, total: bar(done, total, ""),
        )
        if how.accelerator is Processor.GPU:
            verdicts = _on_gpu(loaded, pairs, chosen, how.gpu_tolerance, lambda done, total: bar(done, total, "GPU"))
    print_verdict(report, loaded, len(chosen), verdicts, as_json=as_json)


def _on_gpu(
    loaded: Model,
    pairs: list[tuple[int, int]],
    samples: list[list[Array]],
    tolerance: float,
    step: Callable[[int, int], None],
) -> list[Verdict]:
    configure_logging("error")  # what the log says of each part is in the verdicts
    with accelerated(loaded, AcceleratorOptions(tolerance=tolerance, batches=())) as (store, accelerator):
        return verify_on_gpu(store, pairs, samples, accelerator, step=step)


def print_verdict(
    report: Report, loaded: Model, samples: int, verdicts: list[Verdict] | None = None, *, as_json: bool
) -> None:
    """Print the result of `verify`; raises `typer.Exit` with code 1 for a difference that is not explained.

    `verdicts` are those on the GPU, if it was asked for.
    """
    if as_json:
        worst = None if report.worst is None else {"cut1": report.worst[0], "cut2": report.worst[1]}
        print_json(
            {
                "model": report.model,
                "positions": report.positions,
                "checked": report.checked,
                "bit_identical": report.bit_identical,
                "max_abs_diff": report.max_abs_diff,
                "worst": worst,
                "uncuttable": _uncuttable(loaded),
                "samples": samples,
                "differing": [{"cut1": first, "cut2": second} for first, second in report.differing],
                "explanation": report.explanation,
                "signature": report.signature,
                "unseen": list(report.unseen),
            }
            | ({} if verdicts is None else {"gpu": [_verdict_row(verdict) for verdict in verdicts]})
        )
    else:
        Console(emoji=False).print(verify_lines(report, samples))
        if verdicts is not None:
            Console(emoji=False).print(gpu_lines(verdicts))
    if (not report.bit_identical and not report.explained) or any(verdict.reason for verdict in verdicts or ()):
        raise typer.Exit(EXIT_FAILED)


def _verdict_row(verdict: Verdict) -> dict[str, Any]:
    return {
        "segment": f"{verdict.begin + 1}..{verdict.end}",
        "max_rel_diff": verdict.max_rel_diff,
        "trusted": not verdict.reason,
        "reason": verdict.reason,
    }


def _asked_cuts(loaded: Model, cut1: str | None, cut2: str | None) -> tuple[int, int]:
    """The positions of --cut1 and --cut2. Raises `ConfigError`, `UnknownNameError`, `CutError`."""
    if cut1 is None:
        if cut2 is not None:
            raise ConfigError("--cut2 needs --cut1", remedy="use --cut1 0 to run no layer on the device")
        return even_cuts(loaded.manifest)
    first = position_of(loaded, cut1)
    second = first if cut2 is None else position_of(loaded, cut2)
    if first > second:
        raise CutError(f"cut1 {cut1} is after cut2 {cut2}")
    return first, second


def _given(loaded: Model, path: Path) -> list[list[np.ndarray[Any, Any]]]:
    with stored_arrays(path) as stored:
        return named_inputs(loaded, dict(stored))


def _uncuttable(loaded: Model) -> list[dict[str, Any]]:
    return [{"position": position, "reason": reason} for position, reason in sorted(loaded.graph.blocked.items())]


def _counted(kinds: Iterator[str] | Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _entry(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name,
        "title": entry.title,
        "layers": entry.layers,
        "size_bytes": entry.size_bytes,
        "sha256": entry.sha256,
        "path": str(entry.path),
        "ready": entry.ready,
    }
