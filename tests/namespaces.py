"""Two sites on one machine: network namespaces joined by a link of a given rate, for tests that must see a real network.

A namespace has interfaces, addresses and ports of its own; what runs in one reaches the other only through the link. Making
them takes root on Linux, `ip` and `tc` (iproute2). The rate is held by the kernel's token bucket, in each direction.

DEEPAR_TEST_NETNS=required makes the lack of any of this a failure; without it, the tests that need it are skipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

_CLONE_NEWNET = 0x40000000
_NICENESS = -10
_LINK = "site"  # the link's name in both namespaces
_Answer = TypeVar("_Answer")


class NoNamespacesError(Exception):
    """Namespaces cannot be made here; the message says why."""


def required() -> bool:
    """Whether their lack is a failure."""
    return os.environ.get("DEEPAR_TEST_NETNS") == "required"


class Namespace:
    """One network namespace: commands begin with `prefix`, functions of this process enter it by `call`."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.prefix = ["nice", "-n", str(_NICENESS), "ip", "netns", "exec", name]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._enter)

    def call(self, function: Callable[[], _Answer]) -> _Answer:
        """`function()`, in a thread that has this namespace's network. One call at a time."""
        return self._thread.submit(function).result()

    def interface_bytes(self) -> tuple[int, int]:
        """Bytes that have left over the link, and that have come."""
        (link,) = json.loads(_run("ip", "-n", self.name, "-s", "-j", "link", "show", "dev", _LINK))
        return int(link["stats64"]["tx"]["bytes"]), int(link["stats64"]["rx"]["bytes"])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/var/run/netns", self.name).open("rb") as where:
            if libc.setns(where.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")


def first_in_line(pid: int) -> None:
    """Serve the session that this process leads before others, as far as the kernel lets us: what is measured here is a
    network, not how busy the machine is with other things.

    The commands of a namespace are nice to nobody; but where the kernel groups processes by session (autogroup), that counts
    inside the session only, and the session itself must be put first.
    """
    with contextlib.suppress(OSError):
        Path("/proc", str(pid), "autogroup").write_text(str(_NICENESS))


class Link:
    """Two namespaces, joined; leaving the block removes them. Raises `NoNamespacesError` where they cannot be made."""

    def __init__(self, one: str, other: str, *, rate_bps: int) -> None:
        self.ends = (Namespace(one, "10.200.77.1"), Namespace(other, "10.200.77.2"))
        self._rate_bps = rate_bps

    def __enter__(self) -> Self:
        _require_tools()
        one, other = self.ends
        self._remove()  # what a run that was cut off has left
        try:
            for end in self.ends:
                _run("ip", "netns", "add", end.name)
                _run("ip", "-n", end.name, "link", "set", "lo", "up")
            peer = ("peer", "name", _LINK, "netns", other.name)
            _run("ip", "-n", one.name, "link", "add", _LINK, "type", "veth", *peer)
            for end in self.ends:
                _run("ip", "-n", end.name, "address", "add", f"{end.address}/30", "dev", _LINK)
                _run("ip", "-n", end.name, "link", "set", _LINK, "up")
            self.set_rate(self._rate_bps)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in self.ends:
            end.close()
        self._remove()

    def set_rate(self, rate_bps: int) -> None:
        """Hold both directions to `rate_bps`, Ethernet frames counted.

        The bucket holds 32 KiB, 13 ms at 20 Mbit/s; 100 ms of the rate may queue before frames are dropped, as in a router.
        """
        for end in self.ends:
            shape = ("tbf", "rate", f"{rate_bps}bit", "burst", "32kb", "latency", "100ms")
            _run("tc", "-n", end.name, "qdisc", "replace", "dev", _LINK, "root", *shape)

    def _remove(self) -> None:
        for end in self.ends:
            if Path("/var/run/netns", end.name).exists():
                _run("ip", "netns", "delete", end.name)


def _require_tools() -> None:
    if sys.platform != "linux":
        raise NoNamespacesError("network namespaces are Linux's")
    if os.geteuid() != 0:
        raise NoNamespacesError("only root can make network namespaces")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise NoNamespacesError(f"{' and '.join(missing)} not found: install iproute2")


def _run(*words: str) -> str:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoNamespacesError(f"`{' '.join(words)}` failed on this machine: {done.stderr.strip()}")
    return done.stdout
