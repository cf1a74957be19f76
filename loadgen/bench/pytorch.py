"""Networks of the zoo in PyTorch, in float32 and with random weights, measured in a child process.

DeePar does not depend on PyTorch: `installed` says whether it is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bus.errors import ConfigError
from bus.text.json_text import json_text
from stages.models.runtime.trial_run import ChildProgram, child_environment, last_words
from stages.zoo.networks import NETWORKS, Conv, Dense, Layer, MaxPool

NAMES = ("lenet", "vgg16")
"""Networks that it knows all layers of."""

CHILD = ChildProgram("from loadgen.bench.pytorch import main; main()", longest_s=120.0)
"""Takes the network's name, the longest time of a measurement in seconds and sizes of batches; importing PyTorch alone may
take half a minute."""


def installed() -> bool:
    """Whether this Python has PyTorch."""
    return find_spec("torch") is not None


def measure(
    name: str, batches: Sequence[int], longest_s: float, child: ChildProgram = CHILD
) -> tuple[str, dict[int, float]]:
    """The device (`cuda` or `cpu`), and samples a second of each batch. Raises `ConfigError` if PyTorch fails."""
    arguments = [name, str(longest_s), *map(str, batches)]
    threads = os.cpu_count() or 1
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", child.code, *arguments],
            capture_output=True,
            timeout=child.longest_s,
            check=False,
            env=child_environment(os.environ, threads),
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"PyTorch did not end within {child.longest_s:.0f} s") from None
    if done.returncode != 0:
        raise ConfigError(f"PyTorch failed: {last_words(done.stderr)}")
    answer = json.loads(done.stdout)
    return answer["device"], dict(zip(batches, answer["rates"], strict=True))


def main() -> None:
    """The child process: measure and print `{device, rates}`."""
    import torch  # type: ignore[import-not-found]

    name, longest_s, batches = sys.argv[1], float(sys.argv[2]), [int(batch) for batch in sys.argv[3:]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 in all its bits
    layers = [made for layer in NETWORKS[name].layers for made in _modules(torch.nn, layer)]
    model = torch.nn.Sequential(*layers).to(device).eval()
    _, height, width, channels = NETWORKS[name].input_shape
    rates = []
    with torch.inference_mode():
        for batch in batches:
            sample = np.random.default_rng(batch).random((batch, channels, height, width), np.float32)
            took_s: list[float] = []
            begin_s = perf_counter()
            while len(took_s) < 5 or perf_counter() - begin_s < longest_s:
                before_s = perf_counter()
                model(torch.from_numpy(sample).to(device)).cpu()  # with the copies to the device and back
                took_s.append(perf_counter() - before_s)
            rates.append(batch / median(took_s[2:]))
    print(json_text({"device": device, "rates": rates}))


def _modules(nn: Any, layer: Layer) -> list[Any]:
    """The modules of a layer. Raises `ValueError` for layers that it does not know."""
    match layer:
        case Conv(stride=1):
            return [nn.LazyConv2d(layer.filters, layer.size, padding="same" if layer.same else 0), nn.ReLU()]
        case MaxPool():
            return [nn.MaxPool2d(layer.size, layer.stride)]
        case Dense():
            return [nn.Flatten(), nn.LazyLinear(layer.outputs), *([nn.ReLU()] if layer.relu else [])]
        case _:
            raise ValueError(f"{layer.name} is not known here")
