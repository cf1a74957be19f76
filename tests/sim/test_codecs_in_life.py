"""Tasks whose activations are encoded: planner and stages in virtual time, against the core-only driver."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from bus.messages import TaskState
from bus.values import Codec, CodecProfile, ModelProfile, Objective, PairAgreement
from loadgen.sim.core_driver import drive
from loadgen.sim.platforms import Platforms
from loadgen.sim.scenario import Scenario
from loadgen.sim.simulator import simulate
from tests.known import known
from tests.unit.loadgen.machines import machines

BUSY = Scenario(devices=24, edges=2, within_s=6, samples=(1, 40), slots=(1, 2), profile="paper", codecs=True)
RATIOS = {Codec.ZSTD: 1.5, Codec.Q8: 6.0}
ENCODES_BPS = {Codec.ZSTD: 200e6, Codec.Q8: 800e6}  # bytes a second


def with_measured_codecs(profile: ModelProfile) -> ModelProfile:
    """The profile with codecs at every cut; lossy ones agree enough after the first layer."""
    codecs = tuple(
        CodecProfile(
            position=position,
            codec=codec,
            bytes=int(size / RATIOS[codec]),
            encode_s=size / ENCODES_BPS[codec],
            decode_s=size / ENCODES_BPS[codec] / 2,
            agreement=None if codec.lossless else 0.995 if position else 0.9,
        )
        for position, size in enumerate(profile.cut_bytes[:-1])
        for codec in RATIOS
    )
    pairs = tuple(
        PairAgreement(position1=one, codec1=Codec.Q8, position2=two, codec2=Codec.Q8, agreement=0.992)
        for two in range(profile.layers)
        for one in range(1, two)
    )
    return ModelProfile.model_validate(
        profile.model_copy(update={"codecs": codecs, "agreements": pairs, "calibration_samples": 500})
    )


def encoding_machines() -> Platforms:
    plain = machines()
    profiles = {role: tuple(with_measured_codecs(one) for one in found) for role, found in plain.profiles.items()}
    return replace(plain, profiles=profiles)


@pytest.mark.parametrize(
    ("policy", "objective", "min_agreement", "codec"),
    [
        ("deepar", Objective.SEQUENTIAL, 0.99, Codec.Q8),
        ("deepar", Objective.PIPELINED, 0.99, Codec.Q8),
        ("deepar", Objective.PIPELINED, None, Codec.ZSTD),
        ("routes", Objective.PIPELINED, 0.99, Codec.Q8),
        ("routes", Objective.PIPELINED, None, Codec.ZSTD),
    ],
)
def test_life_with_codecs_agrees_with_the_driver(
    policy: str, objective: Objective, min_agreement: float | None, codec: Codec
) -> None:
    scenario = BUSY.varied(policy=policy, objective=objective, min_agreement=min_agreement)
    expected = drive(scenario, 0, encoding_machines())
    found = simulate(scenario, 0, encoding_machines(), horizon_s=100_000).outcomes
    assert all(outcome.state is TaskState.COMPLETED for outcome in found)
    ways = [way for one in found if one.placement is not None for way in one.placement.routes or ()]
    used = Counter(one for way in ways for one in (way.codec1, way.codec2))
    assert used[codec] > 5
    assert set(used) <= {Codec.RAW, codec}
    found_s, expected_s = ([known(outcome.delay_s) for outcome in outcomes] for outcomes in (found, expected))
    assert sum(found_s) / sum(expected_s) == pytest.approx(1.0, abs=0.01)
