"""Reader that feeds a region's topics into a view, live or as a replay at a chosen speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator

import structlog

from bus import topics
from bus.errors import BusError, BusUnavailableError, ConfigError
from bus.port import Bus, Reader, Record, TopicPartition
from deploy.monitor.region_view import TOPICS, RegionView

EVENTS_BACK = 2000
"""Number of events before the end that the live view reads. Older events are not needed: the decisions record every end."""
RETRY_S = 1.0
LONGEST_PAUSE_S = 2.0
"""A replay shortens longer pauses between records to this."""

log = structlog.get_logger("deepar")


class SilenceWatch:
    """Measures the time since the planner's last record, for a view.

    The last record of the history is dated by its send time, all later ones by their arrival on this machine's clock. So a
    planner with a wrong clock looks silent for one heartbeat at most.
    """

    def __init__(
        self, view: RegionView, clock: Callable[[], float] = time.monotonic, today: Callable[[], float] = time.time
    ) -> None:
        """`clock`: seconds that never jump; `today`: seconds since 1970."""
        self._view, self._clock, self._today = view, clock, today
        self._heard = 0
        self._heard_at_s: float | None = None  # on `clock`; None: the history was not read to its end

    @property
    def live(self) -> bool:
        """Whether the history was read to its end."""
        return self._heard_at_s is not None

    def go_live(self) -> None:
        """Date the last record of the history, which has been read to its end."""
        self._heard = self._view.heard
        self._heard_at_s = self._clock() - max(0.0, self._today() - self._view.heard_s)

    def look(self) -> None:
        """Tell the view how long its planner has been silent, once the history was read."""
        if self._heard_at_s is None:
            return
        if self._view.heard != self._heard:
            self._heard, self._heard_at_s = self._view.heard, self._clock()
        self._view.note_silence(self._clock() - self._heard_at_s)


async def follow(bus: Bus, view: RegionView, *, until_end: bool = False, silence: SilenceWatch | None = None) -> None:
    """Fold all records, then new ones as they arrive, until cancelled; with `until_end`, return at the end of the topics.

    Raises `ConfigError` for a region that does not exist, `UnknownTopicError` if the topics are missing.
    """
    silence = silence or SilenceWatch(view)
    reader = await open_reader(bus, view.region)
    try:
        while True:
            try:
                for record in await reader.fetch(timeout_s=0.5):
                    view.read(record)
                if not silence.live and await reader.lag() == 0:
                    silence.go_live()
                silence.look()
                if until_end and silence.live:
                    return
            except BusUnavailableError as error:
                if until_end:
                    raise
                log.warning("topics not read; retrying", error=str(error))
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(0)  # lets other tasks run while the fetch buffer is full
    finally:
        await reader.close()


async def play_again(bus: Bus, view: RegionView, *, speed: float) -> None:
    """Fold the records on the topics at `speed` times their original pace (0: without pauses), then return."""
    records = in_order(await read_all(bus, view.region))
    clock = asyncio.get_running_loop().time
    shown_s = clock()
    before_ms: int | None = None
    for record, sent_ms in records:
        if speed > 0 and before_ms is not None:
            shown_s += min((sent_ms - before_ms) / 1000, LONGEST_PAUSE_S) / speed
            if (ahead_s := shown_s - clock()) > 0.001:
                await asyncio.sleep(ahead_s)
        before_ms = sent_ms
        view.read(record)


async def read_all(bus: Bus, region: int) -> list[Record]:
    """Every record of the view's topics, in the order of reading."""
    reader = await open_reader(bus, region, events_back=None)
    found: list[Record] = []
    try:
        while await reader.lag():
            found += await reader.fetch(timeout_s=0.2)
    finally:
        await reader.close()
    return found


def in_order(records: Iterable[Record]) -> Iterator[tuple[Record, int]]:
    """Sort records by send time; records of one topic keep their order even if the senders' clocks disagree."""
    timed: list[tuple[int, Record]] = []
    latest: dict[str, int] = {}
    for record in records:
        latest[record.topic] = max(latest.get(record.topic, 0), record.timestamp_ms)
        timed.append((latest[record.topic], record))
    for sent_ms, record in sorted(timed, key=lambda pair: pair[0]):
        yield record, sent_ms


async def open_reader(bus: Bus, region: int, *, events_back: int | None = EVENTS_BACK) -> Reader:
    """Open a reader of the view's topics. Raises `ConfigError` for a region that does not exist."""
    try:
        regions = await bus.partitions(topics.DECISIONS)
    except BusUnavailableError:
        raise
    except BusError as error:
        raise ConfigError(
            f"the region cannot be read: {error}", remedy="start a planner, or: deepar topics create"
        ) from None
    if region >= regions:
        raise ConfigError(f"region {region} does not exist: the topics have {regions} region(s), counted from 0")
    start: dict[TopicPartition, int] = {(topic, region): 0 for topic in TOPICS}
    if events_back is not None:
        ends = await bus.end_offsets(topics.EVENTS)
        start[topics.EVENTS, region] = max(0, ends[region] - events_back)
    return await bus.reader(list(start), start=start)
