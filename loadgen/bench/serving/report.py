"""The report of the serving benchmark: a row for each case and peer, and the aims."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Final

from loadgen.bench.serving.rounds import Case
from loadgen.bench.serving.streams import Stream

SMALL, LARGE = "lenet", "wide"
REST_OVER_MLSERVER_AIM: Final = 2.5
GRPC_OVER_MLSERVER_AIM: Final = 1.4
SMALL_CPU_AIM_S: Final = 0.000_45
LARGE_CPU_AIM_S: Final = {"rest-binary": 0.001_2, "grpc": 0.002}
SESSION_SHARE_AIM: Final = 1 / 3
"""Of the median delay of a task per request."""
OVER_STATIONS_AIM_S: Final = 0.015

NO_PEER: Final = {"peer": None, "peer_requests_per_s": None, "peer_cpu_s_per_request": None}


def rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row for every case of ours and every peer with the same model and as many clients."""
    found = []
    for case in (case for case in cases if case.server == "deepar"):
        peers = [peer for peer in cases if peer.server != "deepar" and _alike(case, peer)]
        for peer in peers:
            told = {
                "peer": f"{peer.server} {peer.protocol}",
                "peer_requests_per_s": round(peer.requests_per_s, 1),
                "peer_cpu_s_per_request": peer.cpu_s_per_request,
            }
            found.append(case.as_row() | told)
        if not peers:
            found.append(case.as_row() | NO_PEER)
    return found


def _alike(case: Case, peer: Case) -> bool:
    return case.model == peer.model and (case.concurrency == peer.concurrency or peer.server == "interpreter")


def aims(cases: Sequence[Case], streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """The aims that this run can judge: those with MLServer only where it was measured."""
    return [*_rate_aims(cases), *_cpu_aims(cases), *_stream_aims(streams)]


def _find(cases: Sequence[Case], server: str, protocol: str, model: str) -> Case | None:
    wanted = (server, protocol, model, 1)
    return next((one for one in cases if (one.server, one.protocol, one.model, one.concurrency) == wanted), None)


def _rate_aims(cases: Sequence[Case]) -> list[dict[str, Any]]:
    found = []
    peer = _find(cases, "mlserver", "grpc", SMALL)
    for protocol, aim in (("rest-binary", REST_OVER_MLSERVER_AIM), ("grpc", GRPC_OVER_MLSERVER_AIM)):
        ours = _find(cases, "deepar", protocol, SMALL)
        if ours is not None and peer is not None:
            ratio = ours.requests_per_s / peer.requests_per_s
            found.append(_aim(f"{protocol} {SMALL}: requests/s over MLServer's gRPC", ratio, aim, ratio >= aim))
    return found


def _cpu_aims(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Processor time of the endpoint, without the time of the model itself."""
    found = []
    for model, limits in ((SMALL, dict.fromkeys(LARGE_CPU_AIM_S, SMALL_CPU_AIM_S)), (LARGE, LARGE_CPU_AIM_S)):
        whole = _find(cases, "interpreter", "in-process", model)
        for protocol, limit_s in limits.items():
            ours = _find(cases, "deepar", protocol, model)
            if ours is not None and whole is not None:
                spent_s = max(0.0, ours.cpu_s_per_request - whole.cpu_s_per_request)
                name = f"{protocol} {model}: processor time of the endpoint"
                found.append(_aim(name, spent_s, limit_s, spent_s <= limit_s))
    return found


def _stream_aims(streams: Sequence[Stream]) -> list[dict[str, Any]]:
    by_mode = {one.mode: one for one in streams}
    session, request = by_mode.get("session"), by_mode.get("request")
    if session is None:
        return []
    found = [_aim("session: frames lost", session.lost, 0, session.lost == 0)]
    p50_s = session.quantile_s(0.5)
    if request is not None:
        share, aim = p50_s / request.quantile_s(0.5), SESSION_SHARE_AIM
        found.append(_aim("session: p50 over that of a task per request", share, aim, share <= aim))
    if session.stations_s:
        over_s, aim = p50_s - median(session.stations_s), OVER_STATIONS_AIM_S
        found.append(_aim("session: p50 over the stations' times", over_s, aim, over_s <= aim))
    return found


def _aim(name: str, value: float, aim: float, good: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "aim": aim, "pass": good}
