"""The estimates of a region, as state: changed only by recorded `Learned` changes, placements and new profiles.

Each estimate keeps the observations that it uses. The numbers of estimates are bounded; the least recently changed one is
dropped. Values are taken from the record and not computed again, so a newer planner replays older records to the same state.

Stale estimates: see `planner.learning.values`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from hashlib import blake2b
from itertools import chain, islice
from statistics import median
from typing import Any, Final

from bus.messages import (
    Learned,
    LearnedLink,
    LearnedNode,
    LearnedPath,
    LearnedSpeed,
    Placed,
    StaleEstimate,
)
from bus.values import Kind
from planner.learning.estimates import WINDOW, Line, rounded, scatter
from planner.learning.staleness import AGING, DueEstimates
from planner.learning.values import (
    EARLY_STEPS,
    MOST_STALE,
    NO_PATH,
    NODE_PRIOR,
    Age,
    LinkEstimate,
    LinkKey,
    NodeEstimate,
    NodeKey,
    PathEstimate,
    PathKey,
    SlowTransfers,
    SpeedEstimate,
    family_kind,
    towards,
)

DEFAULT_LIMIT: Final = 5_000
"""Limit of estimates of each sort (nodes, paths, links)."""

SavedEstimate = Sequence[Any]  # sort, key and value of an estimate, as JSON can hold them
_SHOWN: Final = 8  # last changed estimates that show what to assume of others
_SHORTER: Final = {
    Kind.DEVICE: (),
    Kind.DEVICE_EDGE: (Kind.DEVICE,),
    Kind.DEVICE_CLOUD: (Kind.DEVICE_EDGE, Kind.DEVICE),
    Kind.DEVICE_EDGE_CLOUD: (Kind.DEVICE_EDGE, Kind.DEVICE),
}
"""Families whose paths are part of those of a family, the longest first."""
_RECENT: Final = 64  # last changed nodes among which those are looked for that show a scatter


class EstimateTable:
    """All estimates of a region. Mutated only by `RegionState.apply`."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self.taught = 0  # tasks that have taught something
        self.nodes: OrderedDict[NodeKey, NodeEstimate] = OrderedDict()  # least recently changed first
        self.paths: OrderedDict[PathKey, PathEstimate] = OrderedDict()
        self.links: OrderedDict[LinkKey, LinkEstimate] = OrderedDict()
        self.slow: OrderedDict[LinkKey, SlowTransfers] = OrderedDict()  # only links whose last transfers were slow
        self.speeds: OrderedDict[tuple[str, str], SpeedEstimate] = OrderedDict()  # (node, model)
        self.served: OrderedDict[str, str] = OrderedDict()  # edge -> cloud node that served its last task
        self.deviations: dict[str, float] = {}  # of the predictions for tasks of an edge or device, by its name
        self._stale = 0  # estimates that are stale
        self._due = DueEstimates()
        self._kin: dict[tuple[str, str], OrderedDict[Any, None]] = {}  # see `_families`; last changed last
        self._priors: dict[Kind, Line] = {}
        self._digests: dict[Any, int] = {}
        self._touched: set[Any] = set()
        self._digest = 0
        self._watchers: list[Callable[[str | None], None]] = []

    def __bool__(self) -> bool:
        return bool(self.nodes or self.paths or self.links)

    def watch(self, watcher: Callable[[str | None], None]) -> None:
        """Call `watcher` with the node whose predictions have changed; None: of all devices."""
        self._watchers.append(watcher)

    # --- changes -----------------------------------------------------------------------------------------------------

    def apply(self, learned: Learned, whole_s: Callable[[str, str], float], now: float) -> None:
        """Apply a recorded change. `whole_s`: the time of one sample of a model on a node, by its profile."""
        if learned.task_id is not None:
            self.taught += 1
        for node in learned.nodes:
            self._learn_node(node, whole_s(node.node, node.model), now)
        for path in learned.paths:
            self._learn_path(path, now)
            if learned.cloud is not None and path.edge is not None:
                self._serve(path.edge, learned.cloud)
        for link in learned.links:
            self._learn_link(link, now)
        for speed in learned.speeds:
            self._learn_speed(speed, whole_s(speed.node, speed.model), now)
        for stale in learned.stale:
            self._step(stale, now)
        self._due.tidy(dict(self._tables()))

    def _learn_node(self, learned: LearnedNode, whole_s: float, now: float) -> None:
        key = learned.node, learned.model, learned.alone
        old = self.nodes.get(key)
        seen = (learned.profile_s, learned.samples, learned.busy_s)
        observed = (*(() if old is None else old.observed), seen)
        line = Line(learned.factor, learned.overhead_s)
        expected = None if old is None else _ratio(line, old.line, learned.profile_s, learned.samples)
        age = self._aged(None if old is None else old.age, expected, learned.kept < min(len(observed), WINDOW), now)
        new = NodeEstimate(observed[-learned.kept :], line, whole_s, age)
        self._put(self.nodes, key, new)
        if old is None or old.used != new.used:
            self._tell(learned.node)

    def _learn_path(self, learned: LearnedPath, now: float) -> None:
        key = learned.device, learned.edge or "", learned.kind
        old = self.paths.get(key)
        seen = (learned.samples, learned.delay_s, learned.gap_s, learned.error)
        observed = (*(() if old is None else old.observed), seen)
        line = Line(learned.task_s, learned.sample_s)
        expected = None
        if old is not None and learned.delay_s > 0:  # a path has no time of its own: compare whole delays
            expected = 1.0 + (line.a - old.line.a + (line.b - old.line.b) * learned.samples) / learned.delay_s
        age = self._aged(None if old is None else old.age, expected, learned.kept < min(len(observed), WINDOW), now)
        new = PathEstimate(observed[-learned.kept :], line, learned.deviation, age)
        self._put(self.paths, key, new)
        self._refresh(key)
        if old is None or (old.line, old.age.steps) != (new.line, new.age.steps):
            self._tell(learned.device)

    def _aged(self, old: Age | None, ratio: float | None, changed: bool, now: float) -> Age:
        """The age after an observation. `ratio`: the new prediction over the old one; `changed`: older ones are dropped."""
        if old is None or ratio is None:
            return Age(now, self.taught)
        confirmed, jumped = old.confirmed, old.jumped
        if old.tried:
            confirmed = confirmed + 1 if ratio > 0.8 else 0
        if changed:
            confirmed, jumped = (0, ratio > 1.0)
        return Age(now, self.taught, 0, confirmed, False, jumped)

    def _learn_link(self, learned: LearnedLink, now: float) -> None:
        key = learned.link, learned.device or "", learned.edge
        old = self.links.get(key)
        limited_at = now if old is None or old.bps != learned.bps else old.at_s
        new = LinkEstimate(learned.latency_s, learned.bps, limited_at)
        self._put(self.links, key, new)
        if learned.slow is not None:
            self._drop(self.slow, key)
            if learned.slow:
                self._put(self.slow, key, learned.slow)
        if old is None:  # the gaps that were observed without a latency contain it
            self._forget_paths(lambda path: _passes(path, key))
        if old is None or (old.latency_s, old.bps) != (new.latency_s, new.bps):
            self._tell(learned.device or learned.edge)

    def _learn_speed(self, learned: LearnedSpeed, whole_s: float, now: float) -> None:
        node, model = learned.node, learned.model
        share = learned.factor / self.speed(node, model)
        self._put(self.speeds, (node, model), SpeedEstimate(learned.factor, whole_s))
        if share < 1.0:
            self._recover(node, model, share, now)

    def _recover(self, node: str, model: str, share: float, now: float) -> None:
        """A node takes only this share of the time that it took: one task tries it, and its result replaces older ones.

        The overheads of its paths are expected to shrink by as much, because the same processor packs and sends.
        """
        for alone in (False, True):
            found = self.nodes.get((node, model, alone))
            if found is not None:
                age = found.age._replace(at_s=now, tasks=self.taught, steps=MOST_STALE)
                self._put(self.nodes, (node, model, alone), found._replace(age=age))
                self._tell(node)
        for key in list(self._kin.get(("paths", node), ())):
            path = self.paths[key]
            line = Line(*(rounded(value * share) if value > 0 else value for value in path.line))
            self._put(self.paths, key, path._replace(observed=(), line=line))
            self._refresh(key)
            self._tell(key[0])

    def _serve(self, edge: str, cloud: str) -> None:
        if self.served.get(edge) != cloud:
            self._put(self.served, edge, cloud)
            self._tell(edge)

    def _step(self, stale: StaleEstimate, now: float) -> None:
        found: NodeEstimate | PathEstimate | None
        if stale.model is not None:
            key: Any = stale.node, stale.model, stale.alone
            table: OrderedDict[Any, Any] = self.nodes
        else:
            key = stale.node, stale.edge or "", stale.kind
            table = self.paths
        found = table.get(key)
        if found is not None:
            steps = found.age.steps + (EARLY_STEPS if found.age.early(len(found.observed)) else 1)
            age = found.age._replace(at_s=now, tasks=self.taught, steps=steps)
            self._put(table, key, found._replace(age=age))
            self._tell(stale.node)

    def placed(self, placed: Placed, clouds: Iterable[str], now: float) -> None:
        """A task is placed: if it tries a stale estimate, other tasks wait for its result."""
        if not self._stale:
            return
        placement = placed.placement
        alone = placement.kind is Kind.DEVICE
        tiers = [placed.device] if placement.uses_device else []
        if placement.uses_slot and placement.edge is not None:
            tiers.append(placement.edge)
        if placement.uses_cloud:
            tiers.extend(clouds)  # any of them may serve it
        keys: list[tuple[OrderedDict[Any, Any], Any]] = [(self.nodes, (node, placed.model, alone)) for node in tiers]
        keys.append((self.paths, (placed.device, placement.edge or "", family_kind(placement.kind))))
        for table, key in keys:
            found = table.get(key)
            if found is not None and found.age.steps:
                age = found.age._replace(at_s=now, tasks=self.taught, steps=0, tried=True)
                self._put(table, key, found._replace(age=age))
                self._tell(key[0])

    def joined(self, node: str, whole_s: Iterable[tuple[str, float]], changed: Collection[str] = ()) -> None:
        """A node announced the times of one sample by model: forget what was learned with another profile.

        `changed`: models whose batches have changed.
        """
        for model, now_s in whole_s:
            for key in ((node, model, False), (node, model, True)):
                found = self.nodes.get(key)
                if found is not None and (found.whole_s != now_s or model in changed):
                    self._drop(self.nodes, key)
                    self._tell(node)
            speed = self.speeds.get((node, model))
            if speed is not None and speed.whole_s != now_s:
                self._drop(self.speeds, (node, model))

    def _forget_paths(self, which: Callable[[PathKey], bool]) -> None:
        for key in [key for key in self.paths if which(key)]:
            self._drop(self.paths, key)
            self._refresh(key)
            self._tell(key[0])

    def _put(self, table: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        old = table.pop(key, None)
        self._stale += _is_stale(value) - _is_stale(old)
        table[key] = value
        name = self._name(table)
        self._touched.add((name, key))
        for family in _families(name, key):
            kin = self._kin.setdefault(family, OrderedDict())
            kin[key] = None
            kin.move_to_end(key)
        if name in AGING:
            self._due.put(name, key, value)
        if len(table) > self.limit:
            oldest = next(iter(table))
            self._drop(table, oldest)
            if name == "path":
                self._refresh(oldest)

    def _drop(self, table: OrderedDict[Any, Any], key: Any) -> None:
        old = table.pop(key, None)
        if old is not None:
            name = self._name(table)
            self._stale -= _is_stale(old)
            self._touched.add((name, key))
            for family in _families(name, key):
                kin = self._kin[family]
                del kin[key]
                if not kin:
                    del self._kin[family]

    def _tell(self, node: str | None) -> None:
        for watcher in self._watchers:
            watcher(node)

    def _name(self, table: OrderedDict[Any, Any]) -> str:
        return next(name for name, one in self._tables() if one is table)

    def _tables(self) -> Iterable[tuple[str, OrderedDict[Any, Any]]]:
        yield from (("node", self.nodes), ("path", self.paths), ("link", self.links))
        yield from (("slow", self.slow), ("speed", self.speeds), ("served", self.served))

    # --- questions ---------------------------------------------------------------------------------------------------

    def node(self, node: str, model: str, alone: bool = False) -> Line:
        """Factor and overhead of a sample of a model on a node.

        `alone`: of a device that runs the whole model. It neither packs, sends nor receives activations meanwhile, so it is
        faster than the same device within a path, and both are learned apart.
        """
        found = self.nodes.get((node, model, alone))
        return self.node_prior(node, alone) if found is None else found.used

    def node_prior(self, node: str, alone: bool = False) -> Line:
        """What is assumed of a model that a node has not run: what its other models showed last.

        Of a device in a path, also what it showed alone; not the other way round, as overheads of a path would count.
        """
        for sort in ("alone",) if alone else ("models", "alone"):
            if kin := self._kin.get((sort, node)):
                return self.nodes[next(reversed(kin))].used
        return NODE_PRIOR.line

    def scatter(self) -> float:
        """By how much times of equal tasks differ: what the nodes and models that changed last show together."""
        recent = islice(reversed(self.nodes.values()), _RECENT)
        shown = islice(filter(None, map(NodeEstimate.differences, recent)), _SHOWN)
        return scatter(list(chain.from_iterable(shown)))

    def path(self, device: str, edge: str | None, kind: Kind) -> Line:
        """Overheads of a task and of a sample on a path."""
        found = self.paths.get((device, edge or "", kind))
        prior = self.path_prior(kind)
        return prior if found is None else towards(found.line, prior, found.age)

    def path_prior(self, kind: Kind) -> Line:
        """What is assumed of a path that no task has taken: what other paths of its kind show, or of a shorter one."""
        priors = self._priors
        if kind in priors:
            return priors[kind]
        if kind is Kind.DEVICE_CLOUD and Kind.DEVICE_EDGE_CLOUD in priors:
            return priors[Kind.DEVICE_EDGE_CLOUD]
        if kind is Kind.DEVICE_EDGE_CLOUD and Kind.DEVICE_CLOUD in priors:
            return priors[Kind.DEVICE_CLOUD]
        for shorter in _SHORTER[kind]:  # a longer path costs at least as much
            if shorter in priors:
                return priors[shorter]
        return NO_PATH.line

    def _refresh(self, path: PathKey) -> None:
        """Compute what follows from a path: the prior of its kind, and the deviations of its device and its edge."""
        device, edge, kind = path
        self._refresh_prior(kind)
        for name in (device, edge) if edge else (device,):
            spreads = [one.deviation for one in self._last_paths(("paths", name))]
            if spreads:
                self.deviations[name] = median(spreads)
            else:
                self.deviations.pop(name, None)

    def _last_paths(self, family: tuple[str, str]) -> list[PathEstimate]:
        kin = self._kin.get(family)
        return [] if kin is None else [self.paths[key] for key in islice(reversed(kin), _SHOWN)]

    def _refresh_prior(self, kind: Kind) -> None:
        """Compute the prior of a kind of paths: the median of those that changed last."""
        lines = [path.line for path in self._last_paths(("kind", kind))]
        old = self._priors.get(kind)
        if not lines:
            self._priors.pop(kind, None)
        else:
            self._priors[kind] = Line(rounded(median(one.a for one in lines)), rounded(median(one.b for one in lines)))
        if self._priors.get(kind) != old:
            self._tell(None)

    def link(self, link: int, device: str, edge: str) -> LinkEstimate | None:
        """What is known of a link; `device` is "" for link 2."""
        return self.links.get((link, device, edge))

    def speed(self, node: str, model: str) -> float:
        """What a node without work showed last, relative to its profile; 1 if it reported nothing."""
        found = self.speeds.get((node, model))
        return 1.0 if found is None else found.factor

    def stale(self, now: float) -> StaleEstimate | None:
        """The estimate that has been stale for longest and looks worse than it may be, or None."""
        found = self._due.first(self.taught, now, dict(self._tables()))
        if found is None:
            return None
        name, key = found
        if name == "node":
            return StaleEstimate(node=key[0], model=key[1], alone=key[2])
        return StaleEstimate(node=key[0], edge=key[1] or None, kind=key[2])

    # --- hash and snapshot -------------------------------------------------------------------------------------------

    def digest(self) -> int:
        """The sum of the hashes of all estimates; only those changed since the last call are hashed."""
        if not self._touched:
            return self._digest + self.taught
        tables = dict(self._tables())
        for mark in self._touched:
            self._digest -= self._digests.pop(mark, 0)
            name, key = mark
            value = tables[name].get(key)
            if value is not None:
                self._digests[mark] = found = _hash_of(f"{name}|{key!r}|{value!r}")
                self._digest += found
        self._touched.clear()
        return self._digest + self.taught

    def full_digest(self) -> int:
        """The same sum, computed from scratch."""
        entries = ((name, key, value) for name, table in self._tables() for key, value in table.items())
        return self.taught + sum(_hash_of(f"{name}|{key!r}|{value!r}") for name, key, value in entries)

    def export(self) -> list[SavedEstimate]:
        """All estimates, least recently changed first."""
        return [(name, key, value) for name, table in self._tables() for key, value in table.items()]

    def load(self, taught: int, entries: Iterable[Sequence[Any]]) -> None:
        """Load the entries of `export`, also after a way through JSON, into an empty table."""
        self.taught = taught
        tables = dict(self._tables())
        for name, key, value in entries:
            table = tables[name]
            if name == "node":
                observed, line, whole_s, age = value
                self._put(table, tuple(key), NodeEstimate(_tuples(observed), Line(*line), whole_s, Age(*age)))
            elif name == "path":
                device, edge, kind = key
                observed, line, spread, age = value
                estimate = PathEstimate(_tuples(observed), Line(*line), spread, Age(*age))
                self._put(table, (device, edge, Kind(kind)), estimate)
            elif name == "speed":
                self._put(table, tuple(key), SpeedEstimate(*value))
            elif name == "link":
                self._put(table, tuple(key), LinkEstimate(*value))
            elif name == "slow":
                self._put(table, tuple(key), _tuples(value))
            else:
                self._put(table, key, value)
        for path in self.paths:
            self._refresh(path)
        self._tell(None)


def _families(name: str, key: Any) -> tuple[tuple[str, str], ...]:
    """The groups of related estimates: the models of a node, the paths of a kind, of a device and of an edge."""
    if name == "node":
        return (("alone" if key[2] else "models", key[0]),)
    if name != "path":
        return ()
    device, edge, kind = key
    return ("kind", kind), ("paths", device), *((("paths", edge),) if edge else ())


def _tuples(rows: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    return tuple(tuple(row) for row in rows)


def _is_stale(value: Any) -> bool:
    return isinstance(value, NodeEstimate | PathEstimate) and value.age.steps > 0


def _ratio(new: Line, old: Line, profile_s: float, samples: int) -> float:
    before = old.a * profile_s + old.b * samples
    return 1.0 if before <= 0 else (new.a * profile_s + new.b * samples) / before


def _passes(path: PathKey, link: LinkKey) -> bool:
    """Whether a path uses a link."""
    device, edge, kind = path
    if link[0] == 1:
        return (device, edge) == link[1:]
    return edge == link[2] and kind in (Kind.DEVICE_CLOUD, Kind.DEVICE_EDGE_CLOUD)


def _hash_of(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")
