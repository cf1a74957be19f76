"""The network that a node plays on its own link: link 1 of a device, link 2 of an edge or a cloud node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bus.errors import ConfigError
from stages.network.trace import MAX_LATENCY_S, Trace


@dataclass(frozen=True, slots=True)
class PlayedNetwork:
    """A constant latency, or a trace of bandwidth and latency. The default plays nothing.

    Raises `ConfigError` where the latency is given twice.
    """

    latency_s: float = 0.0  # one way
    trace: Trace | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s <= MAX_LATENCY_S:
            raise ConfigError(f"a latency of {self.latency_s:g} s is not between 0 and {MAX_LATENCY_S:g} s")
        if self.trace is not None and self.trace.has_latency and self.latency_s:
            raise ConfigError(
                f"a latency of {self.latency_s:g} s, and trace {self.trace.name} has latencies, too",
                remedy="leave out one of them: the option, or the column latency_s of the trace",
            )

    @property
    def delays(self) -> bool:
        """Whether anything is delayed at any time."""
        return self.mean_latency_s > 0

    @property
    def mean_latency_s(self) -> float:
        """The latency that the node announces."""
        return self.trace.mean_latency_s if self.trace is not None and self.trace.has_latency else self.latency_s

    def latency_at(self, elapsed_s: float) -> float:
        """The latency after this time since the node started."""
        if self.trace is not None and self.trace.has_latency:
            return self.trace.latency_s(elapsed_s)
        return self.latency_s


NO_NETWORK: Final = PlayedNetwork()
