"""tritonclient without retries, under steady load over HTTP, gRPC, a stream and a session, until a file `stop` appears.

Prints the outcome of every request, as JSON: what became of it, and how long it took. After the stop it asks on until every
worker was answered several times in a row.
"""

from __future__ import annotations

import itertools
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tests.clients.cases import DATATYPES, Case, Comparison, given

DEADLINE_S = 15.0
PAUSE_S = 0.1
IN_A_ROW = 5
SAMPLES = 16  # of the case
CALM_S = 90.0
"""How long the workers may take at the end until they are answered again."""
SESSION = 77


def one_sample(case: Case, at: int) -> Case:
    """The case with sample `at` only, so that neighbouring requests differ."""
    return Case(
        case.model,
        {name: array[at : at + 1] for name, array in case.inputs.items()},
        {name: array[at : at + 1] for name, array in case.outputs.items()},
    )


def inputs(library: Any, case: Case) -> list[Any]:
    described = []
    for name, array in case.inputs.items():
        one = library.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        one.set_data_from_numpy(array)
        described.append(one)
    return described


class Load:
    """The samples to send, and what became of each request."""

    def __init__(self, case: Case, stop: Path) -> None:
        self.case = case
        self.stop = stop
        self.outcomes: list[dict[str, Any]] = []
        self.calm: dict[str, bool] = {}  # worker -> whether it was answered again at the end
        self._lock = threading.Lock()

    def note(self, worker: str, request_id: str, began_s: float, error: Exception | None) -> bool:
        """Keep an outcome; returns whether it is an answer."""
        took_s = time.monotonic() - began_s
        told = None if error is None else str(error)
        with self._lock:
            self.outcomes.append({"worker": worker, "id": request_id, "took_s": took_s, "error": told})
        return error is None

    def numbers(self, worker: str) -> Iterator[int]:
        """Numbers of requests until the stop; then until `took` has been told of answers in a row, within `CALM_S`."""
        until_s = None
        for number in itertools.count():
            if until_s is None and self.stop.exists():
                until_s = time.monotonic() + CALM_S
                self.calm[worker] = False
            if until_s is not None and (self.calm[worker] or time.monotonic() > until_s):
                return
            yield number
            time.sleep(PAUSE_S)

    def run(self, worker: str, infer: Callable[[Case, str, int], Any]) -> None:
        """Send requests one after another and compare the answers."""
        in_a_row = 0
        for number in self.numbers(worker):
            case, request_id = one_sample(self.case, number % SAMPLES), f"{worker}-{number}"
            began_s = time.monotonic()
            try:
                output = infer(case, request_id, number)
            except InferenceServerException as error:
                answered = self.note(worker, request_id, began_s, error)
            except OSError as error:  # the HTTP client's own timeout
                answered = self.note(worker, request_id, began_s, error)
            else:
                Comparison().same(case, output, request_id)
                answered = self.note(worker, request_id, began_s, None)
            in_a_row = in_a_row + 1 if answered else 0
            if worker in self.calm and in_a_row >= IN_A_ROW:
                self.calm[worker] = True


def over_http(load: Load, url: str, worker: str, placement: str) -> None:
    with triton_http.InferenceServerClient(
        url, network_timeout=2 * DEADLINE_S, connection_timeout=DEADLINE_S
    ) as client:

        def infer(case: Case, request_id: str, number: int) -> Any:
            result = client.infer(
                case.model,
                inputs(triton_http, case),
                request_id=request_id,
                timeout=int(DEADLINE_S * 1e6),
                parameters={"placement": placement},
            )
            assert result.get_response()["id"] == request_id
            return result.as_numpy

        load.run(worker, infer)


def over_grpc(load: Load, url: str, worker: str, more: dict[str, str], sequence_id: int = 0) -> None:
    with triton_grpc.InferenceServerClient(url, channel_args=[("grpc.enable_retries", 0)]) as client:

        def infer(case: Case, request_id: str, number: int) -> Any:
            result = client.infer(
                case.model,
                inputs(triton_grpc, case),
                request_id=request_id,
                client_timeout=DEADLINE_S,
                parameters=more,
                sequence_id=sequence_id,
                sequence_start=number == 0,
            )
            assert result.get_response().id == request_id
            return result.as_numpy

        load.run(worker, infer)


def on_a_stream(load: Load, url: str, worker: str) -> None:
    """Requests on one stream; each has exactly one reply."""
    with triton_grpc.InferenceServerClient(url, channel_args=[("grpc.enable_retries", 0)]) as client:
        replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(callback=lambda result, error: replies.put((result, error)))

        def infer(case: Case, request_id: str, number: int) -> Any:
            client.async_stream_infer(
                case.model,
                inputs(triton_grpc, case),
                request_id=request_id,
                timeout=int(DEADLINE_S * 1e6),
                parameters={"placement": "-device"},
            )
            try:
                result, error = replies.get(timeout=2 * DEADLINE_S)
            except queue.Empty:
                raise AssertionError(f"{request_id} has no reply") from None
            if error is not None:
                raise error
            assert result.get_response().id == request_id  # a second reply to an earlier request would be here
            return result.as_numpy

        load.run(worker, infer)
        time.sleep(1.0)
        assert replies.empty(), "a request has two replies"
        client.stop_stream()


def main() -> None:
    (cases, http, grpc), folder = given(), Path(sys.argv[1])
    load = Load(cases[0], folder / "stop")
    workers: dict[str, Callable[[str], None]] = {
        "http edge": lambda name: over_http(load, http, name, "edge"),
        "http cloud": lambda name: over_http(load, http, name, "cloud"),
        "grpc": lambda name: over_grpc(load, grpc, name, {"placement": "-device"}),
        "grpc tasks": lambda name: over_grpc(load, grpc, name, {"placement": "device,edge", "deepar_mode": "request"}),
        "grpc session": lambda name: over_grpc(load, grpc, name, {"placement": "-device"}, SESSION),
        "stream": lambda name: on_a_stream(load, grpc, name),
    }
    failed: list[str] = []

    def run(name: str, work: Callable[[str], None]) -> None:
        try:
            work(name)
        except BaseException as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=entry) for entry in workers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"outcomes": load.outcomes, "failed": failed, "calm": load.calm, "deadline_s": DEADLINE_S}))


if __name__ == "__main__":
    main()
