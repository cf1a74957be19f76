"""Small made-up machines for tests: four models of a few layers, three speeds."""

from __future__ import annotations

import hashlib

from bus.values import ModelProfile, Role
from loadgen.sim.platforms import Platforms

MODELS: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "alexnet": ((0.020, 0.010, 0.005, 0.030, 0.005), (605_000, 1_160_000, 280_000, 186_000, 36_000, 4_000)),
    "vgg16": ((0.20, 0.10, 0.05, 0.10), (600_000, 3_000_000, 1_600_000, 100_000, 4_000)),
    "deepface": ((0.20, 0.10, 0.05, 0.11), (600_000, 3_000_000, 1_600_000, 100_000, 10_488)),
    "lenet": ((0.004, 0.002, 0.003), (3_136, 18_816, 4_704, 40)),
}
SPEED = {Role.DEVICE: 1.0, Role.EDGE: 0.5, Role.CLOUD: 0.125}


def machines() -> Platforms:
    """Device, edge and cloud; the edge twice, the cloud eight times as fast as the device."""
    return Platforms(
        name="made-up machines",
        profiles={
            role: tuple(
                ModelProfile(
                    model=model,
                    sha256=hashlib.sha256(model.encode()).hexdigest(),
                    platform=role.value,
                    layer_names=tuple(f"layer_{index + 1}" for index in range(len(times))),
                    layer_s=tuple(seconds * speed for seconds in times),
                    cut_bytes=sizes,
                )
                for model, (times, sizes) in MODELS.items()
            )
            for role, speed in SPEED.items()
        },
        link1_bps=200_000_000,
        link2_bps=20_000_000,
        input_bytes={"alexnet": 605_000, "vgg16": 200_000, "deepface": 200_000, "lenet": 1_000},
        origin="made up for a test",
    )
