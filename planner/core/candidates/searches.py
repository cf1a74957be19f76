"""The prepared cut searches, by the profile rows of device, edge and cloud, within a limit of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bus.values import Objective
from planner.search.codec_search import CodecSearch, PathSearch, codec_search_bytes, may_encode
from planner.search.cost import PlatformRow
from planner.search.cut_search import CutSearch, search_bytes
from planner.search.route_search import route_search_bytes

MAX_SEARCH_BYTES: Final = 256 << 20
"""Memory limit for prepared searches. When it is exceeded, all are dropped and rebuilt on demand."""

_Rows = tuple[PlatformRow, PlatformRow | None, PlatformRow | None]
_Key = _Rows | tuple[PlatformRow, PlatformRow | None, PlatformRow | None, float | None]
"""The rows of device, edge and cloud; with codecs also the consent."""


class PreparedSearches:
    """Prepares each search once. `on_drop` is called when all are dropped, so that no other cache keeps one."""

    def __init__(self, max_bytes: int, on_drop: Callable[[], None], *, mixes: bool) -> None:
        """`mixes`: whether the policy places tasks of several routes."""
        self.max_bytes = max_bytes
        self.held_bytes = 0  # upper bound of the memory that the searches hold
        self._on_drop = on_drop
        self._mixes = mixes
        self._searches: dict[_Key, tuple[PathSearch, int]] = {}  # and an upper bound of its bytes
        self._of_row: dict[PlatformRow, list[_Key]] = {}  # of tracked rows only

    def track(self, row: PlatformRow) -> None:
        """Remember the searches that use this row from now on, so that `forget` finds them."""
        self._of_row.setdefault(row, [])

    def forget(self, row: PlatformRow) -> None:
        """Drop a tracked row and the searches that use it."""
        for key in self._of_row.pop(row, ()):
            if (held := self._searches.pop(key, None)) is not None:
                self.held_bytes -= held[1]

    def search(
        self,
        device: PlatformRow,
        edge: PlatformRow | None,
        cloud: PlatformRow | None,
        consent: float | None,
        objective: Objective,
    ) -> PathSearch:
        """The search for tasks on these platforms. A cloud whose model has other layers is left out."""
        if cloud is not None and cloud.layers != device.layers:
            cloud = None
        rows = device, edge, cloud
        key: _Key = rows if not may_encode(rows, consent) else (*rows, consent)
        held = self._searches.get(key)
        if held is None:
            size_bytes = self._size_bytes(key, objective)
            if self.held_bytes + size_bytes > self.max_bytes:
                self._drop_all()
            self.held_bytes += size_bytes
            held = CutSearch(*rows) if len(key) == 3 else CodecSearch(rows, consent), size_bytes
            self._searches[key] = held
            for row in rows:
                if row is not None and row in self._of_row:
                    self._of_row[row].append(key)
        return held[0]

    def _size_bytes(self, key: _Key, objective: Objective) -> int:
        """An upper bound of the memory that the search of a key holds."""
        device = key[0]
        crossings = device.layers
        if len(key) == 3:
            size_bytes = search_bytes(device.layers, objective)
        else:
            size_bytes = codec_search_bytes(device.layers, len(device.codings))
            crossings += len(device.codings)
        return size_bytes + (route_search_bytes(crossings) if self._mixes else 0)

    def _drop_all(self) -> None:
        self._searches.clear()
        for keys in self._of_row.values():
            keys.clear()
        self.held_bytes = 0
        self._on_drop()
