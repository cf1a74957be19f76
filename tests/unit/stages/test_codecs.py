"""Codecs on the links of a task: real models on a device, an edge and the cloud, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bus import topics
from bus.codecs.coding import decode_sample, encode, encode_sample
from bus.errors import ProtocolError
from bus.frames import AttemptPlan, Frame, decode_frame
from bus.messages import Admitted, Placed, Rerouted, SeedInput, Start, TaskCompleted, TaskFailed, TaskSubmitted
from bus.tensors import Array, Encoded, TensorHead, to_pieces
from bus.values import (
    BatchSpeed,
    Codec,
    CodecProfile,
    Execution,
    Kind,
    ModelProfile,
    Objective,
    Parts,
    Placement,
    Route,
)
from loadgen.sim.virtual_loop import run_virtual
from stages import litert_stations
from stages.batches import Batcher
from stages.devices.session import Keep
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.models.model import Model, read_model
from stages.models.segments.store import SegmentStore
from stages.network.frame_sender import RETRY_S
from stages.runner import Coder, ModelledRunner, PaceClock, Station
from stages.zoo.registry import digits
from tests.model_plans import plan_of, profile_of
from tests.unit.stages import built_models
from tests.unit.stages.scripted_region import PROFILE, SESSION, ScriptedRegion, placed_and_started, scripted_region

ENCODE_S, DECODE_S = 0.02, 0.01
RAW, ZSTD, Q8, Q4 = Codec.RAW, Codec.ZSTD, Codec.Q8, Codec.Q4


class RealCoder:
    """Encodes and decodes on the event loop, in no time."""

    waited_s = 0.0

    def __init__(self, codec: Codec, limit_bytes: int) -> None:
        self._codec, self._limit_bytes = codec, limit_bytes

    async def encode(self, tensors: Sequence[Array], ready_s: float) -> Encoded:
        return encode_sample(self._codec, tensors)

    async def decode(self, encoded: Encoded, ready_s: float) -> list[Array]:
        return decode_sample(encoded, self._limit_bytes)


class RealStation:
    """Computes on the event loop, in no time."""

    waited_s = 0.0

    def __init__(self, compute: Callable[[Sequence[Array]], list[Array]]) -> None:
        self._compute = compute

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        return [np.array(output) for output in self._compute(inputs)]

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None

    def close(self) -> None:
        pass


class RealRunner(ModelledRunner):
    """Computes with a real model."""

    def __init__(self, model: Model, inputs: Callable[[int], list[Array]]) -> None:
        self.profile = profile_of(model)
        super().__init__([self.profile])
        self._store, self.inputs = SegmentStore(model), inputs

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        return self.inputs

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        return RealStation(self._store.prepare(first, last).run)

    def coder(self, plan: AttemptPlan, position: int, codec: Codec, pace: PaceClock) -> Coder:
        return RealCoder(codec, self.profile.cut_bytes[position])

    def whole(self, sample: int) -> list[Array]:
        """The outputs of the model that is not cut."""
        return [np.array(one) for one in self._store.prepare(0, self.profile.layers).run(self.inputs(sample))]


def route(cut1: int, cut2: int, codec1: Codec, codec2: Codec = RAW, share: float = 1.0) -> Route:
    return Route(cut1=cut1, cut2=cut2, share=share, codec1=codec1, codec2=codec2, stations_s=(0.001,) * 7)


def placement(profile: ModelProfile, *routes: Route) -> Placement:
    first = routes[0]
    return Placement(
        kind=Kind.of(first.cut1, first.cut2, profile.layers), edge="e", cut1=first.cut1, cut2=first.cut2,
        cut1_name=profile.cut_name(first.cut1), cut2_name=profile.cut_name(first.cut2), link1_bps=10_000_000,
        link2_bps=10_000_000 if any(one.cut2 < profile.layers for one in routes) else 0, routes=routes,
    )  # fmt: skip


@dataclass
class Tasks:
    """Tasks under way in one region, and their results."""

    region: ScriptedRegion
    profile: ModelProfile
    shown: dict[str, dict[int, list[Array]]] = field(default_factory=dict)

    async def place(self, placement: Placement, samples: int, name: str = "t") -> None:
        """Start a task."""
        model, sha256 = self.profile.model, self.profile.sha256
        task = TaskSubmitted(task_id=name, device="d", model=model, samples=samples, input=SeedInput(seed=1))
        placed = Placed(
            task_id=name, attempt=1, device="d", model=model, sha256=sha256, samples=samples, policy="p",
            objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=placement, start_s=0.0, wait_s=0.0,
            delay_s=1.0, parts=Parts(device_s=0.001 * samples),
        )  # fmt: skip
        await self.region.decide(Admitted(task=task), placed, Start(task_id=name, attempt=1, device="d", at_s=0.0))

    async def ended(self, name: str = "t") -> TaskCompleted | TaskFailed:
        """What the nodes report at the end of a task."""
        async with asyncio.timeout(600.0):
            while True:
                for event in self.region.events():
                    if event.task_id == name:
                        return event
                await asyncio.sleep(0.01)

    async def results(self, samples: int, name: str = "t") -> list[list[Array]]:
        """The outputs of all samples of a task, in order."""
        completed = await self.ended(name)
        assert isinstance(completed, TaskCompleted), completed
        assert sorted(self.shown[name]) == list(range(samples))
        return [self.shown[name][sample] for sample in range(samples)]

    def crossed(self, topic: str) -> dict[int, tuple[Codec, bytes]]:
        """Codec and payload of each sample on a topic."""
        found: dict[int, tuple[Codec, bytes]] = {}
        for frame in self.region.frames(topic):
            for piece in frame.pieces:
                _, before = found.get(piece.sample, (RAW, b""))
                codec = piece.encoded.codec if piece.encoded else RAW
                found[piece.sample] = (codec, before[: piece.at] + bytes(piece.data))
        return found


@contextlib.asynccontextmanager
async def running(runner: ModelledRunner) -> AsyncIterator[Tasks]:
    shown: dict[str, dict[int, list[Array]]] = {}

    def show(task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        shown.setdefault(task.task_id, {})[sample] = [np.array(output) for output in outputs]

    async with scripted_region(runner=runner, on_result=show) as region:
        yield Tasks(region, runner.profiles()[0], shown)


def digit(sample: int) -> list[Array]:
    return [digits()[0][sample][np.newaxis]]


SAMPLES = 30


@pytest.mark.parametrize(
    "routes",
    [
        [route(2, 4, ZSTD, ZSTD)],
        [route(2, 4, Q8, Q8)],
        [route(0, 3, Q8, ZSTD)],
        [route(1, 7, Q8)],
        [route(3, 3, Q8)],
        [route(0, 0, ZSTD)],
        [route(2, 4, RAW, ZSTD)],
        [route(1, 3, Q4, RAW)],
        [route(1, 3, ZSTD, RAW, 0.4), route(2, 2, ZSTD, share=0.3), route(0, 7, RAW, share=0.3)],
        [route(1, 3, ZSTD, Q8, 0.5), route(1, 3, RAW, ZSTD, 0.5)],
    ],
    ids=lambda routes: "+".join(f"{one.cut1}{one.codec1}-{one.cut2}{one.codec2}" for one in routes),
)
def test_lenet_gives_the_digits_of_the_whole_model_and_without_losses_the_same_bits(
    lenet: Model, routes: list[Route]
) -> None:
    async def run() -> None:
        runner = RealRunner(lenet, digit)
        async with running(runner) as tasks:
            await tasks.place(placement(runner.profile, *routes), SAMPLES)
            results = await tasks.results(SAMPLES)
            lossless = all(one.codec1.lossless and one.codec2.lossless for one in routes)
            for sample, (output,) in enumerate(results):
                (right,) = runner.whole(sample)
                assert output.argmax() == right.argmax()
                if lossless:
                    assert output.tobytes() == right.tobytes()
            at_edge, at_cloud = tasks.crossed(topics.activations_topic("e")), tasks.crossed(topics.ACTIVATIONS_CLOUD)
            assert {codec for codec, _ in at_edge.values()} == {one.codec1 for one in routes}
            crossing2 = [one for one in routes if one.cut2 < runner.profile.layers]
            assert {codec for codec, _ in at_cloud.values()} == {
                one.codec1 if one.cut1 == one.cut2 else one.codec2 for one in crossing2
            }
            assert {codec for codec, _ in tasks.crossed(topics.RESULTS).values()} == {RAW}
            if len(routes) == 1 and routes[0].codec1 is not RAW:
                sizes = [len(payload) for _, payload in at_edge.values()]
                assert max(sizes) < runner.profile.cut_bytes[routes[0].cut1] * (0.9 if lossless else 0.3)

    run_virtual(run())


def test_a_task_that_is_rerouted_goes_on_with_other_codecs(lenet: Model) -> None:
    async def run() -> None:
        runner = RealRunner(lenet, digit)
        async with running(runner) as tasks:
            await tasks.place(placement(runner.profile, route(2, 4, ZSTD, ZSTD)), 300)
            changed = placement(runner.profile, route(1, 3, Q8), route(3, 3, ZSTD, share=0.0))
            change = Rerouted(
                task_id="t", attempt=1, device="d", placement=changed, from_s=1.0, samples=100, delay_s=1.0,
                parts=Parts(),
            )  # fmt: skip
            await tasks.region.decide(change)
            for sample, (output,) in enumerate(await tasks.results(300)):
                assert output.argmax() == runner.whole(sample)[0].argmax()
            codecs = [codec for codec, _ in tasks.crossed(topics.activations_topic("e")).values()]
            assert set(codecs) == {ZSTD, Q8}
            assert codecs.count(Q8) > 30

    run_virtual(run())


@pytest.mark.parametrize("codec", [ZSTD, Q8])
def test_an_edge_without_layers_passes_payloads_on_as_they_are(lenet: Model, codec: Codec) -> None:
    async def run() -> None:
        runner = RealRunner(lenet, digit)
        async with running(runner) as tasks:
            # The second codec means nothing here.
            await tasks.place(placement(runner.profile, route(2, 2, codec, Q4)), SAMPLES)
            await tasks.results(SAMPLES)
            at_edge = tasks.crossed(topics.activations_topic("e"))
            assert len(at_edge) == SAMPLES
            assert tasks.crossed(topics.ACTIVATIONS_CLOUD) == at_edge

    run_virtual(run())


def test_alexnet_agrees_when_its_activations_cross_in_8_bits_and_in_several_pieces(alexnet: Model) -> None:
    async def run() -> None:
        rng = np.random.default_rng(1)
        shape = alexnet.manifest.cuts[0].tensors[0].shape
        images = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
        runner = RealRunner(alexnet, lambda sample: [images[sample]])
        async with running(runner) as tasks:
            await tasks.place(placement(runner.profile, route(1, 5, Q8, Q8)), 2)
            for sample, (output,) in enumerate(await tasks.results(2)):
                (right,) = runner.whole(sample)
                assert output.argmax() == right.argmax()
            pieces = [piece for one in tasks.region.frames(topics.activations_topic("e")) for piece in one.pieces]
            assert len(pieces) > 2

    run_virtual(run())


def test_encoding_belongs_to_the_sender_and_decoding_to_the_receiver() -> None:
    async def run() -> None:
        measured = tuple(
            CodecProfile(position=position, codec=Q8, bytes=16, encode_s=ENCODE_S, decode_s=DECODE_S)
            for position in range(3)
        )
        profile = PROFILE.model_copy(update={"codecs": measured})
        async with running(ModelledRunner([profile])) as tasks:
            for name, cuts in {"all": (1, 2), "edge only": (0, 3), "relay": (1, 1)}.items():
                await tasks.place(
                    placement(profile, route(*cuts, Q8, Q8 if cuts[1] < 3 else RAW)), 10, name[:4].strip()
                )
            everywhere, at_edge, relayed = [await tasks.ended(name) for name in ("all", "edge", "rela")]
            for completed, expected in (
                (everywhere, (0.01 + ENCODE_S, 0.01 + DECODE_S + ENCODE_S, 0.01 + DECODE_S)),
                (at_edge, (ENCODE_S, 0.03 + DECODE_S, 0.0)),
                (relayed, (0.01 + ENCODE_S, 0.0, 0.02 + DECODE_S)),
            ):
                assert isinstance(completed, TaskCompleted)
                parts = completed.measured
                assert (parts.device_s, parts.edge_s, parts.cloud_s) == pytest.approx([10 * one for one in expected])
            sizes = {len(payload) for _, payload in tasks.crossed(topics.activations_topic("e")).values()}
            assert sizes == {16}  # as measured

    run_virtual(run())


def test_encoded_samples_are_computed_in_batches() -> None:
    together = (BatchSpeed(batch=8, factors=(0.25,) * 3),)
    measured = tuple(
        CodecProfile(position=position, codec=Q8, bytes=16, encode_s=0.001, decode_s=0.001) for position in range(3)
    )
    profile = PROFILE.model_copy(update={"codecs": measured, "batch": together, "layer_s": (0.001, 0.04, 0.04)})

    async def run() -> None:
        sizes: list[int] = []
        async with running(ModelledRunner([profile], partial(Batcher, on_batch=sizes.append))) as tasks:
            await tasks.place(placement(profile, route(1, 2, Q8, Q8)), 40)
            completed = await tasks.ended()
            assert isinstance(completed, TaskCompleted)
            parts = completed.measured
            assert max(sizes) > 1
            # 40 samples of a stage take 1.6 s one by one; decoding and encoding count one by one
            assert 40 * (0.01 + 0.002) <= parts.edge_s < 1.0
            assert 40 * (0.01 + 0.001) <= parts.cloud_s < 1.0

    run_virtual(run())


BAD = 3  # the sample that cannot be decoded


class ChokingRunner(ModelledRunner):
    """Cannot decode the fourth sample that the edge decodes of a task."""

    def coder(self, plan: AttemptPlan, position: int, codec: Codec, pace: PaceClock) -> Coder:
        inner = super().coder(plan, position, codec, pace)
        return Choking(inner) if position == 1 and plan.task_id == "bad" else inner


class Choking:
    waited_s = 0.0

    def __init__(self, inner: Coder) -> None:
        self._inner, self._decoded = inner, 0

    async def encode(self, tensors: Sequence[Array], ready_s: float) -> Encoded:
        return await self._inner.encode(tensors, ready_s)

    async def decode(self, encoded: Encoded, ready_s: float) -> list[Array]:
        self._decoded += 1
        if self._decoded == BAD + 1:
            raise ProtocolError("undecodable", "garbage")
        return await self._inner.decode(encoded, ready_s)


def test_a_sample_of_a_batch_that_cannot_be_decoded_is_a_dead_letter_and_other_tasks_go_on() -> None:
    together = (BatchSpeed(batch=8, factors=(0.25,) * 3),)
    profile = PROFILE.model_copy(update={"batch": together, "layer_s": (0.001, 0.04, 0.04)})

    async def run() -> None:
        async with running(ChokingRunner([profile])) as tasks:
            placed = placement(profile, route(1, 2, Q8, Q8))
            await tasks.place(placed, 40, "bad")
            await tasks.place(placed, 40, "good")
            failed = await tasks.ended("bad")
            assert isinstance(failed, TaskFailed)
            assert (failed.cause, failed.node) == ("undecodable", "e")
            assert isinstance(await tasks.ended("good"), TaskCompleted)
            (letters,) = tasks.region.broker.logs(topics.DEAD_LETTER)
            (letter,) = letters.read(0, letters.end)
            assert letter.value is not None
            assert BAD in [piece.sample for piece in decode_frame(letter.value).pieces]

    run_virtual(run())


LIES: dict[str, tuple[Encoded | list[Array], str]] = {}


def lie(name: str, cause: str, sent: Encoded | list[Array]) -> None:
    LIES[name] = (sent, cause)


HEADS = (TensorHead("float32", (1, 14, 14, 6)),)  # of LeNet at 2
TENSOR = np.linspace(0, 1, 14 * 14 * 6, dtype=np.float32).reshape(1, 14, 14, 6)
GOOD = encode(Q8, [TENSOR])
lie("no codec", "wrong_codec", [TENSOR])
lie("another codec", "wrong_codec", encode_sample(Q4, [TENSOR]))
lie("another size", "wrong_shape", encode_sample(Q8, [TENSOR[:, 1:]]))
lie("nothing", "undecodable", Encoded(Q8, HEADS, memoryview(b"")))
lie("cut short", "undecodable", Encoded(Q8, HEADS, memoryview(GOOD[:-5])))
lie("longer", "undecodable", Encoded(Q8, HEADS, memoryview(GOOD + b"x")))
lie("garbage", "undecodable", Encoded(Q8, HEADS, memoryview(bytes(range(200)))))
lie("a bomb", "undecodable", Encoded(Q8, HEADS, memoryview(GOOD[:9] + encode(ZSTD, [np.zeros(1 << 22)])[1:])))


@pytest.mark.parametrize("name", sorted(LIES))
def test_a_payload_that_lies_is_a_dead_letter_and_the_other_tasks_go_on(lenet: Model, name: str) -> None:
    sent, cause = LIES[name]

    async def run() -> None:
        runner = RealRunner(lenet, digit)
        async with running(runner) as tasks:
            placed = placement(runner.profile, route(2, 4, Q8, ZSTD))
            await tasks.place(placed, 1000, "broken")
            await tasks.place(placed, SAMPLES, "t")
            frame = Frame("activations", "broken", 1, "d", to_pieces(900, sent, 100_000))
            await tasks.region.send(topics.activations_topic("e"), frame)
            failed = await tasks.ended("broken")
            assert isinstance(failed, TaskFailed)
            assert (failed.cause, failed.node, failed.retryable) == (cause, "e", False)
            assert len(await tasks.results(SAMPLES)) == SAMPLES
            await asyncio.sleep(RETRY_S)
            (letters,) = tasks.region.broker.logs(topics.DEAD_LETTER)
            (letter,) = letters.read(0, letters.end)
            assert dict(letter.headers)["deepar_cause"] == cause.encode()

    run_virtual(run())


def test_an_encoded_result_is_a_dead_letter_and_the_true_one_counts(lenet: Model) -> None:
    async def run() -> None:
        runner = RealRunner(lenet, digit)
        async with running(runner) as tasks:
            await tasks.place(placement(runner.profile, route(2, 4, Q8, ZSTD)), 400)
            sent = encode_sample(Q8, [np.zeros((1, 10), np.float32)])
            frame = Frame("result", "t", 1, "c1", to_pieces(399, sent, 1000))
            await tasks.region.send(topics.RESULTS, frame, key="d")
            results = await tasks.results(400)
            assert results[-1][0].argmax() == runner.whole(399)[0].argmax()
            (letters,) = tasks.region.broker.logs(topics.DEAD_LETTER)
            (letter,) = letters.read(0, letters.end)
            assert dict(letter.headers)["deepar_cause"] == b"wrong_codec"

    run_virtual(run())


def test_a_payload_that_lies_ends_an_attempt_at_a_session_and_not_the_session(lenet: Model) -> None:
    async def run() -> None:
        runner = RealRunner(lenet, digit)
        async with running(runner) as tasks:
            session = tasks.region.device.open_session(SESSION.model_copy(update={"model": lenet.name}), Keep.ALL)
            placed = placed_and_started(placement(runner.profile, route(2, 4, Q8, ZSTD)))
            of_model = {"model": lenet.name, "sha256": lenet.sha256}
            changes = [one.model_copy(update=of_model) if isinstance(one, Placed) else one for one in placed]
            await tasks.region.decide(Admitted(task=session.submitted), *changes)
            await session.ready()
            answer = await session.push(digit(3))
            assert answer[0].argmax() == runner.whole(3)[0].argmax()
            bad = Encoded(Q8, HEADS, memoryview(GOOD[:-5]))
            frame = Frame("activations", "s", 1, "d", to_pieces(900, bad, 100_000))
            await tasks.region.send(topics.activations_topic("e"), frame)
            failed = await tasks.ended("s")
            assert isinstance(failed, TaskFailed)
            assert (failed.cause, failed.retryable) == ("undecodable", True)

    run_virtual(run())


@pytest.mark.parametrize("inline_bytes", [0, 1 << 20])
def test_the_real_runner_encodes_and_decodes_in_threads_or_at_once(
    lenet: Model, inline_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litert_stations, "INLINE_CODED_BYTES", inline_bytes)

    async def run() -> None:
        runner = LitertRunner([lenet], RunnerOptions(), prepared=Prepared(profiles={lenet.name: profile_of(lenet)}))
        try:
            coder = runner.coder(plan_of(lenet), 2, ZSTD, PaceClock())
            encoded = await coder.encode([TENSOR], 0.0)
            (again,) = await coder.decode(encoded, 0.0)
            assert again.tobytes() == TENSOR.tobytes()
            with pytest.raises(ProtocolError) as caught:  # more than the model has there
                await coder.decode(encode_sample(ZSTD, [np.zeros(14 * 14 * 6 + 1, np.float32)]), 0.0)
            assert caught.value.cause == "oversized"
        finally:
            await runner.close()

    asyncio.run(run())


def test_the_real_runner_keeps_the_zero_points_of_quantised_tensors(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "quantised.tflite"
    path.write_bytes(built_models.quantized().to_bytes())
    model = read_model(path)
    position = next(cut.position for cut in model.manifest.cuts if cut.position > 0 and len(cut.tensors) > 1)
    specs = model.manifest.cuts[position].tensors
    assert {spec.zero_points for spec in specs} == {(-3,)}
    rng = np.random.default_rng(1)
    tensors = [rng.integers(-128, 128, spec.shape).astype(np.int8) for spec in specs]
    for tensor in tensors:
        tensor.flat[:20] = -3

    async def run() -> None:
        runner = LitertRunner([model], RunnerOptions(), prepared=Prepared(profiles={model.name: profile_of(model)}))
        try:
            coder = runner.coder(plan_of(model), position, Q4, PaceClock())
            for tensor, again in zip(tensors, await coder.decode(await coder.encode(tensors, 0.0), 0.0), strict=True):
                assert (again[tensor == -3] == -3).all()
                assert len(np.unique(again)) <= 16
        finally:
            await runner.close()

    asyncio.run(run())


def test_a_slower_machine_takes_longer_to_encode(lenet: Model) -> None:
    async def run() -> None:
        profile = profile_of(lenet).model_copy(
            update={"codecs": (CodecProfile(position=2, codec=ZSTD, bytes=99, encode_s=0.1, decode_s=0.05),)}
        )
        options = RunnerOptions(slowdown=2.0)
        runner = LitertRunner([lenet], options, prepared=Prepared(profiles={lenet.name: profile}))
        try:
            pace, clock = PaceClock(), asyncio.get_running_loop().time
            began_s = clock()
            coder = runner.coder(plan_of(lenet), 2, ZSTD, pace)
            encoded = await coder.encode([TENSOR], began_s)
            assert clock() - began_s >= 0.2
            await coder.decode(encoded, began_s)
            assert clock() - began_s >= 0.3  # one platform does one thing after the other
        finally:
            await runner.close()

    asyncio.run(run())
