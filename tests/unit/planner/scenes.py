"""Small worlds for the planner's tests: nodes, tasks, and stages that do what a `Start` says, early, late, or not at all."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from bus.messages import (
    Change,
    Decision,
    Ended,
    HandleInput,
    NodeAnnounced,
    NodeLeft,
    Placed,
    Rerouted,
    SeedInput,
    Start,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskSubmitted,
)
from bus.values import BatchSpeed, Codec, CodecProfile, ModelProfile, PairAgreement, Parts, Role
from planner.core.core import Event, PlannerCore, Tick
from planner.search.cost import NO_OVERHEADS, Overheads, PlatformRow

SHA = "0" * 64
MBPS = 1_000_000


def profile(
    model: str = "m",
    layer_s: tuple[float, ...] = (0.01, 0.02, 0.03),
    cut_bytes: tuple[int, ...] = (100_000, 50_000, 20_000, 100),
    forbidden: tuple[int, ...] = (),
    sha256: str = SHA,
) -> ModelProfile:
    names = tuple(f"layer_{j}" for j in range(1, len(layer_s) + 1))
    return ModelProfile(
        model=model,
        sha256=sha256,
        platform="test",
        layer_names=names,
        layer_s=layer_s,
        cut_bytes=cut_bytes,
        forbidden=forbidden,
    )


def faster(one: ModelProfile, times: float) -> ModelProfile:
    return one.model_copy(update={"layer_s": tuple(layer / times for layer in one.layer_s)})


def random_rows(rng: random.Random, layers: int, *, exact: bool) -> tuple[PlatformRow, PlatformRow, PlatformRow]:
    """A device, an edge and a cloud, none faster than another; `exact`: few binary fractions, so that ties abound."""
    if exact:
        sizes = tuple(rng.choice((1, 2, 4, 8)) * 128 for _ in range(layers + 1))
    else:
        sizes = tuple(rng.randrange(1, 1_000_000) for _ in range(layers + 1))
    forbidden = tuple(sorted({rng.randrange(1, layers) for _ in range(rng.randrange(3))})) if layers > 1 else ()

    def row() -> PlatformRow:
        times = tuple(rng.randrange(4) / 1024 if exact else rng.random() * 0.01 for _ in range(layers))
        factor, overhead_s = rng.choice((1.0, 1.0, 1.0, 2.0)), rng.choice((0, 0, 0, 1)) / 1024
        return PlatformRow(profile("m", times, sizes, forbidden), factor, overhead_s)

    return row(), row(), row()


def random_overheads(rng: random.Random) -> Overheads:
    """Latencies and overheads, binary fractions; half of the time none."""
    if rng.random() < 0.5:
        return NO_OVERHEADS

    def seconds() -> float:
        return rng.randrange(8) / 1024

    def by_family() -> tuple[float, float, float, float]:
        return seconds(), seconds(), seconds(), seconds()

    return Overheads(seconds(), seconds(), by_family(), by_family())


def edge(node: str = "e1", *, incarnation: str = "i1", speed: float = 4.0, **values: Any) -> NodeAnnounced:
    values = {
        "slots": 1,
        "link1_capacity_bps": 1000 * MBPS,
        "link2_capacity_bps": 100 * MBPS,
        "models": (faster(profile(), speed),),
        **values,
    }
    return NodeAnnounced(node=node, role=Role.EDGE, incarnation=incarnation, **values)


def cloud(node: str = "c1", *, incarnation: str = "i1", speed: float = 20.0, **values: Any) -> NodeAnnounced:
    values = {"models": (faster(profile(), speed),), **values}
    return NodeAnnounced(node=node, role=Role.CLOUD, incarnation=incarnation, **values)


def device(node: str = "d1", *, incarnation: str = "i1", **values: Any) -> NodeAnnounced:
    values = {"models": (profile(),), **values}
    return NodeAnnounced(node=node, role=Role.DEVICE, incarnation=incarnation, **values)


def task(task_id: str = "t1", node: str = "d1", **values: Any) -> TaskSubmitted:
    values = {"model": "m", "samples": 10, "input": SeedInput(seed=1), "max_link1_bps": 100 * MBPS, **values}
    return TaskSubmitted(task_id=task_id, device=node, **values)


def completed(task_id: str = "t1", node: str = "d1", attempt: int = 1) -> TaskCompleted:
    return TaskCompleted(task_id=task_id, attempt=attempt, node=node, measured=Parts(), delay_s=1.0)


def failed(
    task_id: str = "t1", node: str = "e1", attempt: int = 1, cause: str = "bad_frame", retryable: bool = False
) -> TaskFailed:
    return TaskFailed(task_id=task_id, attempt=attempt, node=node, cause=cause, retryable=retryable)


def types(changes: list[Change]) -> list[str]:
    return [change.type for change in changes]


def only(changes: list[Change], kind: type[Any]) -> Any:
    """The one change of a type."""
    found = [change for change in changes if isinstance(change, kind)]
    assert len(found) == 1, f"{len(found)} of {kind.__name__} in {types(changes)}"
    return found[0]


def decision_of(changes: Sequence[Change], seq: int, now: float, core: PlannerCore) -> Decision:
    """The decision that records the changes of a step."""
    return Decision(
        region=0,
        epoch=1,
        nonce="n",
        seq=seq,
        now_s=now,
        inputs={},
        changes=tuple(changes),
        ledger_hash=core.state_hash,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The size of a random region, and how its tasks arrive and end."""

    tasks: int = 60
    rate: float = 1.0  # tasks a second on average
    edges: int = 3
    devices: int = 12
    reach: int = 2  # edges that a device reaches
    own_links: bool = False  # whether devices limit their own link
    orderly: bool = False  # every task ends when it was predicted to, and no node leaves
    codecs: bool = False  # whether nodes have measured codecs, and tasks consent to lossy ones
    batches: bool = False  # whether edges and cloud compute in batches


DEFAULT_TRAFFIC = Traffic()


class RandomRegion:
    """A region in which tasks arrive, start, and end as predicted or not, and nodes come and go; drawn from a seed."""

    def __init__(
        self, core: PlannerCore, seed: int, traffic: Traffic = DEFAULT_TRAFFIC, *, validate: bool = True
    ) -> None:
        """If `validate`, the core's whole state is checked after each event."""
        self.core = core
        self.rng = random.Random(seed)
        self.traffic = traffic
        self.validate = validate
        self.log: list[Decision] = []
        self.ended: dict[str, Ended] = {}
        self.placed: dict[str, Placed] = {}
        self.counts: Counter[str] = Counter()
        self._incarnations: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Event | str]] = []
        self._count = 0
        self._edges = [f"e{i}" for i in range(traffic.edges)]
        devices, orderly = traffic.devices, traffic.orderly
        names = [*self._edges, "c0", *(f"d{i}" for i in range(devices))]
        for name in names:
            self._push(0.0, f"join {name}")
        at_s = 0.0
        rng = self.rng
        for i in range(traffic.tasks):
            at_s += rng.expovariate(traffic.rate)
            source = SeedInput(seed=i) if rng.random() < 0.8 else HandleInput(handle=f"h{i}")
            submitted = TaskSubmitted(
                task_id=f"t{i}",
                device=f"d{rng.randrange(devices)}",
                model=rng.choice("ab"),
                samples=rng.randrange(1, 100),
                input=source,
                max_link1_bps=rng.randrange(20 * MBPS, 300 * MBPS),
                max_link2_bps=rng.randrange(10 * MBPS, 50 * MBPS),
                input_bytes=rng.randrange(10_000, 1_000_000),
                deadline_s=None if orderly else rng.choice((None, None, 50.0)),
            )
            if traffic.codecs:
                consent, own_input = (None, 0.9, 0.995, 1.0)[i % 4], submitted.input_bytes if i % 3 else None
                submitted = submitted.model_copy(update={"min_agreement": consent, "input_bytes": own_input})
            self._push(at_s, submitted)
            if orderly:
                continue
            if rng.random() < 0.1:
                self._push(at_s + rng.random(), submitted)  # a duplicate
            if rng.random() < 0.06:
                name = rng.choice(names)
                self._push(at_s, f"leave {name}")
                self._push(at_s + rng.random() * 5, f"join {name}")
            if rng.random() < 0.05:
                self._push(at_s, TaskCancelled(task_id=f"t{rng.randrange(i + 1)}"))
            if rng.random() < 0.1:
                self._push(at_s, Tick())

    def run(self) -> RandomRegion:
        """Run until every task has ended, and check that each ended once."""
        now = 0.0
        while self._heap or self.core.tasks:
            if not self._heap:
                self._push(max(now, self.core.next_wakeup() or now), Tick())
            now, _, event = heapq.heappop(self._heap)
            self.step(event, now)
        assert len(self.ended) == self.traffic.tasks
        return self

    def step(self, event: Event | str, now: float) -> list[Change]:
        core = self.core
        changes = core.handle(self._spelled(event) if isinstance(event, str) else event, now)
        if changes:
            decision = decision_of(changes, len(self.log) + 1, now, core)
            self.log.append(decision)
        if self.validate:
            core.validate()
        for change in changes:
            self.counts[change.type] += 1
            if isinstance(change, Start):
                self._start(change, now)
            elif isinstance(change, Rerouted):
                self._reroute(change)
            elif isinstance(change, Placed):
                self.placed[change.task_id] = change
                self.counts["delayed"] += change.wait_s > 0
            elif isinstance(change, Ended):
                assert change.task_id not in self.ended, f"{change.task_id} ends twice"
                self.ended[change.task_id] = change
        return changes

    def _start(self, start: Start, now: float) -> None:
        held = self.core.ledger.reservations.get(start.task_id)
        if held is None:
            return
        rng = self.rng
        done = TaskCompleted(
            task_id=start.task_id, attempt=start.attempt, node=start.device, measured=Parts(), delay_s=held.length_s
        )
        if self.traffic.orderly:
            self._push(held.end_s, done)
            return
        ends_s = now + held.length_s * rng.choice((1.0, 1.0, 0.5 + rng.random()))
        luck = rng.random()
        if luck < 0.1:
            fault = TaskFailed(
                task_id=start.task_id,
                attempt=start.attempt,
                node=start.device,
                cause="broken",
                retryable=luck < 0.05,
            )
            self._push(ends_s, fault)
            return
        self._push(ends_s, done)
        if luck > 0.9:
            self._push(ends_s + rng.random(), done)  # a duplicate

    def _reroute(self, change: Rerouted) -> None:
        """The task ends as it is predicted now; its earlier end comes later, and is then a duplicate."""
        done = TaskCompleted(
            task_id=change.task_id, attempt=change.attempt, node=change.device, measured=Parts(), delay_s=change.delay_s
        )
        self._push(change.from_s + change.delay_s, done)

    def _push(self, at_s: float, event: Event | str) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, event))

    def _spelled(self, text: str) -> Event:
        verb, name = text.split()
        if verb == "leave":
            return NodeLeft(node=name, incarnation=f"i{self._incarnations[name]}")
        self._incarnations[name] += 1
        incarnation, rng = f"i{self._incarnations[name]}", self.rng
        speed = {"e": 3.0, "c": 10.0, "d": 1.0}[name[0]]
        models = tuple(_random_profile(model, rng, speed) for model in "ab")
        if self.traffic.codecs and not name.endswith("1"):  # the others are of a version without codecs
            models = tuple(with_codecs(one, random.Random(f"{name} {one.model}")) for one in models)
        if self.traffic.batches and name[0] != "d" and name != "e1":
            models = tuple(with_batches(one, random.Random(f"{name} {one.model}")) for one in models)
        if name[0] == "c":
            return cloud(name, incarnation=incarnation, lease_s=1e6, models=models)
        if name[0] == "d":
            reachable = tuple(rng.sample(self._edges, min(len(self._edges), self.traffic.reach)))
            own_bps = rng.randrange(20 * MBPS, 200 * MBPS) if self.traffic.own_links else 0
            values = {"reachable_edges": reachable, "link1_capacity_bps": own_bps}
            return device(name, incarnation=incarnation, lease_s=1e6, models=models, **values)
        return edge(
            name,
            incarnation=incarnation,
            lease_s=1e6,
            models=models,
            slots=rng.randrange(1, 4),
            link1_capacity_bps=rng.randrange(200 * MBPS, 1000 * MBPS),
            link2_capacity_bps=rng.randrange(20 * MBPS, 100 * MBPS),
        )


def with_batches(one: ModelProfile, rng: random.Random) -> ModelProfile:
    """The profile of a platform that computes in batches, of which some layers gain more than others."""
    fixed = [rng.random() for _ in range(one.layers)]  # share of a layer's time that a batch needs once
    batch = tuple(
        BatchSpeed(batch=size, factors=tuple(share / size + 1 - share for share in fixed)) for size in (2, 4, 8, 16, 32)
    )
    return one.model_copy(update={"batch": batch, "executors": rng.choice((None, 2, 4))})


def with_codecs(one: ModelProfile, rng: random.Random) -> ModelProfile:
    """The profile with codecs at every cut: of one size and agreement for a model, but with times of this platform."""
    shape = random.Random(one.model)
    lossy = {Codec.Q8: (0.2, (0.99, 0.996, 1.0)), Codec.Q4: (0.1, (0.8, 0.95, 0.996))}
    codecs = []
    for position in range(one.layers):
        for codec, (share, levels) in {Codec.ZSTD: (0.7, ()), **lossy}.items():
            codecs.append(
                CodecProfile(
                    position=position,
                    codec=codec,
                    bytes=round(share * (0.5 + shape.random()) * one.cut_bytes[position]),
                    encode_s=rng.random() * 0.0006,
                    decode_s=rng.random() * 0.0003,
                    agreement=shape.choice(levels) if levels else None,
                )
            )
    pairs = [
        PairAgreement(
            position1=cut1, codec1=codec1, position2=cut2, codec2=codec2, agreement=shape.choice((0.8, 0.95, 0.996))
        )
        for cut1, cut2 in combinations(range(one.layers), 2)
        for codec1, codec2 in product(lossy, lossy)
        if shape.random() < 0.7
    ]
    return one.model_copy(update={"codecs": tuple(codecs), "agreements": tuple(pairs)})


def _random_profile(model: str, rng: random.Random, speed: float, layers: int = 10) -> ModelProfile:
    shape = random.Random(model)
    weights = [shape.random() for _ in range(layers)]
    sizes = tuple(shape.randrange(1_000, 1_000_000) for _ in range(layers + 1))
    return profile(model, tuple(w * 0.01 / speed * (0.5 + rng.random()) for w in weights), sizes)
