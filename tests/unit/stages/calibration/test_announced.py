"""Codecs in announcements: what would not fit into a message is left out, the largest first."""

from __future__ import annotations

from bus import messages
from bus.messages import MAX_MESSAGE_BYTES, NodeAnnounced
from bus.values import MAX_CODEC_PROFILES, BatchSpeed, Codec, CodecProfile, ModelProfile, Role
from stages.calibration.announced import fitting


def profile(model: str, codecs: int) -> ModelProfile:
    return ModelProfile(
        model=model, sha256="0" * 64, platform="p", layer_names=("layer",) * 600, layer_s=(0.1,) * 600,
        cut_bytes=(1_000,) * 601, calibration_samples=9 if codecs else None,
        codecs=tuple(
            CodecProfile(position=p, codec=Codec.Q8, bytes=250, encode_s=1e-6, decode_s=1e-6, agreement=1.0)
            for p in range(codecs)
        ) or None,
    )  # fmt: skip


def test_all_codecs_are_announced_where_they_fit() -> None:
    models = (profile("a", 300), profile("b", 0), profile("c", MAX_CODEC_PROFILES))
    assert all(one is whole for one, whole in zip(fitting(models), models, strict=True))


def test_the_largest_ones_are_left_out_until_the_message_fits() -> None:
    models = tuple(profile(f"m{number:02}", MAX_CODEC_PROFILES if number == 3 else 300) for number in range(40))
    found = fitting(models)
    assert found[3] == profile("m03", 0)
    assert 5 < sum(one.codecs is None for one in found) < 35
    assert [one.model for one in found] == [one.model for one in models]
    message = NodeAnnounced(node="d1", role=Role.DEVICE, incarnation="i", models=found)
    assert len(messages.encode(message)) < MAX_MESSAGE_BYTES


def test_profiles_that_are_too_large_by_themselves_stay_as_they_are() -> None:
    models = (profile("a", 0), profile("b", 10))
    assert fitting(models, 1_000) == (models[0], models[1].without_codecs())


def test_batches_are_left_out_where_it_is_not_enough_to_leave_out_codecs() -> None:
    batch = (BatchSpeed(batch=2, factors=(0.5,) * 600),)
    both = {"batch": batch, "executors": 2}
    coded, small = (profile(name, codecs).model_copy(update=both) for name, codecs in (("a", 9), ("b", 0)))
    assert fitting((coded, small)) == (coded, small)
    plain = (coded.without_codecs(), small)
    room = sum(len(one.model_dump_json(exclude_none=True)) for one in plain)
    assert fitting((coded, small), room) == (coded.without_codecs(), small)
    assert fitting((coded, small), room - 1_000) == (profile("a", 0), small)
    assert fitting((coded, small), 1_000) == (profile("a", 0), profile("b", 0))
