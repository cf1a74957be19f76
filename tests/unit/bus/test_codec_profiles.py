"""Measured codecs of a profile: what is announced, what is refused, and which agreement a pair of cuts has."""

from __future__ import annotations

from typing import Any

import pytest

from bus import messages, topics
from bus.messages import MAX_MESSAGE_BYTES, NodeAnnounced, SeedInput, TaskSubmitted
from bus.values import (
    MAX_AGREEMENTS,
    MAX_CODEC_PROFILES,
    MAX_LAYERS,
    Codec,
    CodecProfile,
    ModelProfile,
    PairAgreement,
    Role,
)

RAW, ZSTD, Q8, Q4 = Codec


def profile(layers: int = 4, **more: Any) -> ModelProfile:
    return ModelProfile(
        model="m",
        sha256="0" * 64,
        platform="p",
        layer_names=tuple(f"layer_{j}" for j in range(layers)),
        layer_s=(0.001,) * layers,
        cut_bytes=(1_000,) * (layers + 1),
        **more,
    )


def measured(position: int, codec: Codec, agreement: float | None = None) -> CodecProfile:
    return CodecProfile(position=position, codec=codec, bytes=125, encode_s=2e-6, decode_s=1e-6, agreement=agreement)


def pair(position1: int, codec1: Codec, position2: int, codec2: Codec, agreement: float = 0.99) -> PairAgreement:
    return PairAgreement(position1=position1, codec1=codec1, position2=position2, codec2=codec2, agreement=agreement)


def announced(*models: ModelProfile) -> NodeAnnounced:
    return NodeAnnounced(node="d1", role=Role.DEVICE, incarnation="i", models=models)


def test_a_profile_without_measured_codecs_looks_as_before() -> None:
    text = messages.encode(announced(profile()))
    assert not any(word in text for word in (b"codecs", b"agreements", b"calibration"))
    assert b"min_agreement" not in messages.encode(
        TaskSubmitted(task_id="t", device="d1", model="m", samples=1, input=SeedInput(seed=1))
    )


def test_measured_codecs_come_back() -> None:
    sent = announced(
        profile(
            codecs=(measured(0, ZSTD), measured(2, Q8, 1.0)), agreements=(pair(1, Q4, 2, Q8),), calibration_samples=500
        )
    )
    assert messages.decode(topics.NODES, messages.encode(sent)) == sent


def test_six_models_of_the_largest_size_fit_into_an_announcement() -> None:
    position = MAX_LAYERS - 2
    codecs = tuple(
        CodecProfile(position=position - i // 3, codec=(ZSTD, Q8, Q4)[i % 3], bytes=1 << 24, encode_s=0.000_123_4,
                     decode_s=0.000_123_4, agreement=0.9876)
        for i in range(MAX_CODEC_PROFILES)
    )  # fmt: skip
    pairs = tuple(pair(500 + i % 2, Q8, position - i // 2, Q4, 0.9876) for i in range(MAX_AGREEMENTS // 2)) * 2
    one = profile(MAX_LAYERS, calibration_samples=500).model_copy(update={"codecs": codecs, "agreements": pairs})
    assert len(messages.encode(announced(*[one] * 6))) < MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    "values",
    [
        {"codecs": (measured(1, RAW),)},
        {"codecs": (measured(4, Q8),)},
        {"codecs": (measured(1, Q8), measured(1, Q8, 0.5))},
        {"codecs": tuple(measured(p, Q8) for p in range(MAX_CODEC_PROFILES + 1))},
        {"agreements": (pair(1, ZSTD, 2, Q8),)},
        {"agreements": (pair(1, Q8, 2, RAW),)},
        {"agreements": (pair(2, Q8, 2, Q8),)},
        {"agreements": (pair(1, Q8, 4, Q8),)},
        {"agreements": (pair(0, Q8, 1, Q8),) * (MAX_AGREEMENTS + 1)},
        {"calibration_samples": 0},
    ],
)
def test_what_cannot_have_been_measured_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"codec|pair|at most|greater"):
        profile(**values)


def test_the_agreement_of_a_pair_of_cuts_is_the_measured_one() -> None:
    found = profile(
        codecs=(measured(1, Q8, 0.998), measured(2, Q4, 0.97), measured(2, Q8), measured(3, ZSTD)),
        agreements=(pair(1, Q8, 2, Q4, 0.96),),
    )
    assert found.agreement((1, RAW), (2, ZSTD)) == 1.0
    assert found.agreement((1, Q8), (3, ZSTD)) == 0.998
    assert found.agreement((0, RAW), (2, Q4)) == 0.97
    assert found.agreement((1, Q8), (2, Q4)) == 0.96
    assert found.agreement((1, Q8), (2, Q8)) is None  # each alone is not enough: errors compound
    assert found.agreement((0, RAW), (2, Q8)) is None
    assert found.agreement((3, Q4), (4, RAW)) is None


def test_equal_cuts_are_one_crossing_and_nothing_crosses_after_the_last_layer() -> None:
    found = profile(codecs=(measured(1, Q8, 0.998),))
    assert found.agreement((1, Q8), (1, Q8)) == 0.998
    assert found.agreement((1, RAW), (1, Q8)) == 1.0
    assert found.agreement((1, Q8), (4, Q4)) == 0.998
    assert found.agreement((4, Q8), (4, Q8)) == 1.0


def test_a_slower_machine_encodes_and_decodes_more_slowly_too() -> None:
    slow = profile(codecs=(measured(1, Q8, 0.998),), agreements=(), calibration_samples=9).slowed(3.0)
    assert slow.layer_s == pytest.approx((0.003,) * 4)
    assert slow.codecs is not None
    assert (slow.codecs[0].bytes, slow.codecs[0].agreement, slow.calibration_samples) == (125, 0.998, 9)
    assert slow.codecs[0].encode_s == pytest.approx(6e-6)
    assert slow.codecs[0].decode_s == pytest.approx(3e-6)
    assert profile().slowed(2.0).codecs is None
    assert slow.without_codecs() == profile().slowed(3.0)
