"""Terminal output of `deepar models` and `deepar profile`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from bus.text.units import format_seconds
from bus.values import CutPoint, ModelProfile, TensorSpec
from stages.models.gpu.verdicts import Verdict
from stages.models.model import Model
from stages.models.profiler import Measurement
from stages.models.verify import Report
from stages.zoo.registry import ZooEntry

BAR_WIDTH = 12
NUMBERS_WIDTH = 41
"""Width of the columns for times, spreads and sizes in a profile, spaces included."""


def size(count: float) -> str:
    """`1.2 MB`, `617 kB`, `40 B`: three digits and a unit."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def _spec(spec: TensorSpec) -> str:
    return f"{escape(spec.name)} [dim]{spec.dtype}[/][cyan]\\[{'x'.join(map(str, spec.shape))}][/]"


def models_table(entries: Sequence[ZooEntry]) -> Table:
    """A table of the models in the zoo."""
    table = Table("model", "description", box=None, pad_edge=False)
    for title in ("layers", "size"):
        table.add_column(title, justify="right")
    table.add_column("file")
    for entry in entries:
        where = "ready" if entry.ready else "[dim]generated at first use[/]"
        table.add_row(f"[bold]{entry.name}[/]", entry.title, str(entry.layers), size(entry.size_bytes), where)
    return table


def show_tree(model: Model) -> Tree:
    """A tree with the facts about one model."""
    manifest, graph = model.manifest, model.graph
    tree = Tree(f"[bold]{escape(model.name)}[/]  {escape(str(model.path))}")
    tree.add(f"{size(model.size_bytes)}, SHA-256 {model.file_sha256}")
    work = sum(cut.work for cut in manifest.cuts)
    tree.add(f"{manifest.layers} layers, {work / 1e6:,.1f} million multiply-accumulates")
    if graph.carried:
        tree.add(
            f"{len(graph.carried)} operators that only prepare weights or state belong to the layers that need them"
        )
    for title, cut in (("inputs", manifest.cuts[0]), ("outputs", manifest.cuts[-1])):
        branch = tree.add(f"{title} {size(cut.cut_bytes)}")
        for spec in cut.tensors:
            branch.add(_spec(spec))
    if len(model.contents.signatures) > 1 or model.contents.unseen:
        branch = tree.add("signatures" if model.contents.signatures else "no signatures")
        for one in model.contents.signatures:
            call = f"{escape(one.name)}({escape(', '.join(one.inputs))}) -> {escape(', '.join(one.outputs))}"
            branch.add(f"[bold]{call}: selected[/]" if one.meant else f"{call}: --signature {escape(one.name)}")
        others = [words for words in model.contents.unseen if not words.startswith("signature ")]
        if others:
            branch.add(f"not inspected: {escape(', '.join(others))}")
    for entry in model.contents.open_inputs:
        declared = "x".join(map(str, entry.declared))
        change = f"--input-shape {entry.name}={entry.words}"
        tree.add(escape(f"{entry.name} has the open shape {entry.words}, here {declared}; set it with {change}"))
    if graph.stateful:
        tree.add("stateful; DeePar resets the state before every sample")
    if model.facts.missing_kernels:
        tree.add(f"[red]no kernel for {escape(', '.join(sorted(model.facts.missing_kernels)))}[/]")
    if graph.blocked:
        branch = tree.add(f"{len(graph.blocked)} of {manifest.layers - 1} inner positions cannot be cut")
        reasons: dict[str, list[int]] = {}
        for position, reason in sorted(graph.blocked.items()):
            reasons.setdefault(reason, []).append(position)
        for reason, positions in list(reasons.items())[:8]:
            shown = ", ".join(map(str, positions[:6])) + (", ..." if len(positions) > 6 else "")
            branch.add(f"{shown}: {escape(reason)}")
    return tree


def cuts_table(model: Model, cuts: Iterable[CutPoint], useful: set[int], shares: Sequence[float]) -> Table:
    """A table of cut positions with the tensors that cross each and the work before it."""
    table = Table(title=f"{escape(model.name)}: possible cuts", title_justify="left", box=None, pad_edge=False)
    for title in ("cut", "after", "crosses", "bytes", "work before", ""):
        table.add_column(title, justify="right" if title in ("cut", "bytes", "work before") else "left")
    for cut in cuts:
        note = "[green]useful[/]" if cut.position in useful else ""
        if not cut.cuttable:
            note = f"[red]no: {escape(cut.reason)}[/]"
        specs = [_spec(spec) for spec in cut.tensors[:3]]
        if len(cut.tensors) > 3:
            specs.append(f"and {len(cut.tensors) - 3} more")
        table.add_row(
            str(cut.position),
            escape(cut.name),
            "\n".join(specs),
            size(cut.cut_bytes),
            f"{shares[cut.position]:.1%}",
            note,
        )
    return table


def parts_table(model: Model, manifest: Path, parts: Sequence[dict[str, Any]]) -> Table:
    """A table of the written files."""
    title = f"{escape(model.name)} in {len(parts)} parts: {escape(str(manifest))}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("role", "layers", "file", "size", "sends"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for part in parts:
        sends = ", ".join(spec["name"] for spec in part["outputs"])
        layers = f"{part['first']}..{part['last']}"
        table.add_row(part["role"], layers, escape(part["file"]), size(part["size_bytes"]), escape(sends))
    return table


def verify_lines(report: Report, samples: int) -> Text:
    """The result of a verification as text."""
    pairs = f"{report.checked} pairs of cuts on {samples} sample{'s' if samples != 1 else ''}"
    text = Text()
    if report.bit_identical:
        text.append("bit-identical", "bold green")
        text.append(f": {report.model}, {pairs}")
    else:
        text.append("different", "bold yellow" if report.explained else "bold red")
        worst = "" if report.worst is None else f" at cuts {report.worst[0]} and {report.worst[1]}"
        text.append(f": {report.model}, {len(report.differing)} of {pairs}; at most {report.max_abs_diff:.3g}{worst}")
    if report.explanation:
        text.append(f"\n{report.explanation}")
    for position, reason in report.uncuttable[:8]:
        text.append(f"\nnot cut at {position}: {reason}", "dim")
    if len(report.uncuttable) > 8:
        text.append(f"\nand at {len(report.uncuttable) - 8} more positions", "dim")
    return text


def gpu_lines(verdicts: Sequence[Verdict]) -> Text:
    """The verdicts on a model's parts on the GPU as text."""
    refused = [verdict for verdict in verdicts if verdict.reason]
    largest = max((verdict.max_rel_diff or 0.0 for verdict in verdicts), default=0.0)
    text = Text()
    text.append("refused" if refused else "right", "bold red" if refused else "bold green")
    text.append(
        f" on the GPU: {len(refused) or len(verdicts)} of {len(verdicts)} parts; largest difference {largest:.2g}"
    )
    for verdict in refused[:8]:
        text.append(f"\nlayers {verdict.begin + 1}..{verdict.end}: {verdict.reason}", "dim")
    if len(refused) > 8:
        text.append(f"\nand {len(refused) - 8} more", "dim")
    return text


def gpu_line(profile: ModelProfile) -> str:
    """The speed of the GPU in one line, or why it does not compute the model."""
    if profile.accelerator != "gpu":
        return f"not on the GPU: {profile.not_on_gpu}"
    sizes = [speed.batch for speed in profile.batch or ()]
    batches = [f", {size} together {format_seconds(profile.together_s(size, 0, profile.layers))}" for size in sizes]
    return f"on the GPU: {format_seconds(sum(profile.layer_s))} in one piece{''.join(batches)}"


def profile_table(found: Measurement, profile: ModelProfile, columns: int = 120) -> Table:
    """A table of the time and output size of each layer, with bars; a narrow terminal gets no kinds and shorter bars."""
    room = columns - max(len(layer.name) for layer in found.layers) - NUMBERS_WIDTH
    kinds = max(len(layer.kind) for layer in found.layers) + 2
    with_kinds = room - kinds >= BAR_WIDTH
    cells = max(2, min(BAR_WIDTH, (room - kinds * with_kinds) // 2))
    table = Table(
        title=f"{escape(found.model.name)}: {format_seconds(found.whole_s)} in one piece "
        f"(± {format_seconds(found.whole_spread_s)}), {format_seconds(found.sum_of_slices_s)} layer by layer",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for title in ("layer", *(["kind"] if with_kinds else []), "time", "±", "", "output", ""):
        right = title in ("time", "±", "output")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    slowest = max(profile.layer_s)
    largest = max(layer.output_bytes for layer in found.layers)
    for layer, seconds in zip(found.layers, profile.layer_s, strict=True):
        table.add_row(
            escape(layer.name),
            *([f"[dim]{escape(layer.kind.lower())}[/]"] if with_kinds else []),
            format_seconds(seconds),
            f"[dim]{format_seconds(layer.spread_s)}[/]",
            f"[blue]{_bar(seconds, slowest, cells)}[/]",
            size(layer.output_bytes),
            f"[yellow]{_bar(layer.output_bytes, largest, cells)}[/]",
        )
    return table


def _bar(value: float, largest: float, cells: int) -> str:
    eighths = round(8 * cells * value / largest) if largest else 0
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
