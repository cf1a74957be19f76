"""Machine checks of `deepar doctor`: Python, the inference runtime and its kernels, the disk."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bus.errors import DeeparError
from bus.text.units import format_seconds
from stages.models.files.cache import cache_dir

NEEDED_DISK_BYTES = 2 << 30
PROBE_BYTES = 1 << 20
"""Size of a test write, which detects quotas and read-only mounts that the free space does not show."""

GPU_LAYERS = 4
"""Layers of LeNet that `gpu` runs: those before the fully-connected layer that LiteRT computes wrong on a GPU."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool  # False: something does not work; the exit code is 1
    detail: str
    remedy: str = ""
    warning: bool = False  # it works but needs attention

    @property
    def state(self) -> str:
        """`ok`, `warning` or `failed`."""
        return "failed" if not self.ok else "warning" if self.warning else "ok"


def python() -> Check:
    """Whether this Python is new enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), f"Python {version}", "DeePar needs Python 3.11 or newer")


def runtime(models: Iterable[str]) -> list[Check]:
    """Check the runtime by recognising one digit with LeNet, then check that it has kernels for all operators of `models`."""
    try:
        from stages.models.runtime import litert
        from stages.zoo.registry import digits, load_model
    except ImportError as error:
        return [
            Check("litert", False, f"LiteRT cannot be imported: {error}", "make setup, or: pip install ai-edge-litert")
        ]
    checks = []
    try:
        images, labels = digits()
        model = load_model("lenet")
        before_s = time.perf_counter()
        answer = int(litert.SegmentRunner(model.source).run([images[:1]])[0].argmax())
        took = format_seconds(time.perf_counter() - before_s)
        said = f"LeNet reads a {answer}, which is a {labels[0]}, in {took}"
        checks.append(Check("litert", answer == int(labels[0]), said, "make setup reinstalls the runtime"))
    except DeeparError as error:
        return [Check("litert", False, str(error), error.remedy or "make setup reinstalls the runtime")]
    return checks + [_kernels(name) for name in models]


def _kernels(name: str) -> Check:
    from stages.models.runtime import litert
    from stages.zoo.registry import load_model

    try:
        model = load_model(name)
        missing = set(model.facts.missing_kernels)
        if not missing:
            litert.SegmentRunner(model.source)
    except DeeparError as error:
        return Check("kernels", False, str(error), error.remedy or "choose another model, or repair this one")
    if missing:
        return Check(
            "kernels",
            False,
            f"{name}: the installed LiteRT has no kernel for {', '.join(sorted(missing))}",
            "install a runtime that has it, or convert the model without that operator (`deepar models cuts` shows where)",
        )
    return Check("kernels", True, f"{name}: the runtime has every kernel")


def gpu(environment: Mapping[str, str]) -> list[Check]:
    """Where DEEPAR_ACCELERATOR asks for a GPU: whether it computes the first layers of LeNet as the CPU does."""
    if environment.get("DEEPAR_ACCELERATOR", "cpu") == "cpu":
        return []
    try:
        from stages.models.gpu.accelerator import AcceleratorOptions, accelerated
        from stages.zoo.registry import load_model

        model = load_model("lenet")
    except (ImportError, DeeparError, OSError) as error:
        return [Check("gpu", False, f"LeNet cannot be loaded: {error}", "see the other checks of this machine")]
    with accelerated(model, AcceleratorOptions(batches=())) as (store, accelerator):
        accelerator.prepare(store, 0, GPU_LAYERS)
        reason = accelerator.placements()[model.name, 0, GPU_LAYERS].reason
    if reason:
        remedy = "install the Vulkan loader (libvulkan1) and the GPU's driver, or unset DEEPAR_ACCELERATOR"
        return [Check("gpu", True, f"stages compute on the CPU: {reason}", remedy, warning=True)]
    return [Check("gpu", True, f"layers 1 to {GPU_LAYERS} of LeNet give the same results on the GPU and on the CPU")]


def disk() -> Check:
    """Whether the disk of the cache folder has free space and is writable."""
    remedy = "free some space, or set DEEPAR_CACHE_DIR to a folder on another disk"
    try:
        folder = cache_dir()
        free = shutil.disk_usage(folder).free
        _probe(folder)
    except DeeparError as error:
        return Check("disk", False, str(error), error.remedy or remedy)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return Check("disk", False, f"{folder}: {'the disk is full' if full else error.strerror}", remedy)
    detail = f"{free / 1e9:.1f} GB free for models and segments in {folder}"
    if free <= NEEDED_DISK_BYTES:
        detail += f"; AlexNet and VGG-16 with their segments need {NEEDED_DISK_BYTES / 1e9:.1f}"
    return Check("disk", free > NEEDED_DISK_BYTES, detail, remedy)


def _probe(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * PROBE_BYTES)
        file.flush()
        os.fsync(file.fileno())
