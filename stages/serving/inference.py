"""`Inference` on a device: a request is computed in a warm session, in a session that its client names, or as a task.

A task of its own is planned for the request and takes the time of a decision. A session was planned before. A request has
exactly one answer or one error; the error says whether the request may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bus.messages import Placed, SessionTerms
from bus.tensors import Array
from bus.values import DELAY_PARTS, Codec, Parts, Placement, Role
from stages.devices.endings import SessionEndedError, UnansweredError
from stages.devices.session import DeviceSession, Keep
from stages.measuring.clock import exact_clock
from stages.serving.catalogue import ServedModel
from stages.serving.checking import samples_of
from stages.serving.limits import RETRY_AFTER_S
from stages.serving.statistics import ModelStatistics
from stages.serving.submission import PlanTerms, ServingDevice, Submissions, refusal
from stages.serving.values import (
    Fault,
    InferRequest,
    InferResponse,
    Mode,
    ModelInfo,
    RequestTerms,
    ServingError,
)
from stages.serving.warm import IDLE_S, LOOK_S, MAX_WARM, REFUSED_S, WarmSessions

MAX_SESSION_SAMPLES = 16
"""Larger requests are tasks of their own: their number of samples is then known to the planner."""

MAX_NAMED = 64
"""Sessions that one client may have by name."""

DEFAULT_RATE_HZ = 30.0
"""Rate of a session whose client states none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceOptions:
    """How requests are computed."""

    sessions: bool = True  # requests share warm sessions; without: each is a task
    allowed: tuple[Role, ...] | None = None  # tiers that may compute; None: all
    timeout_s: float = 300.0  # of a request that states none


@dataclass(slots=True)
class _Computed:
    """The outputs of the samples of a request, and how they came about."""

    results: Sequence[Sequence[Array]]
    placed: Placed | None
    measured: Parts | None = None
    delay_s: float | None = None
    wait_s: float = 0.0


@dataclass(slots=True)
class _Named:
    """A session that a client named."""

    plan: PlanTerms
    terms: SessionTerms
    session: DeviceSession
    used_s: float


class DeviceInference:
    """Computes the requests of clients on one device. Run `serving` around its use."""

    def __init__(
        self,
        name: str,
        device: Callable[[], ServingDevice],
        models: Sequence[ServedModel],
        ready: Callable[[], bool],
        options: InferenceOptions | None = None,
    ) -> None:
        """`device` returns the current device: another one takes its place if the broker goes away early."""
        self._options = options or InferenceOptions()
        self._device = device
        self._models = {model.info.name: model for model in models}
        self._is_ready = ready
        self._submissions = Submissions(name, self._options.allowed)
        self._draining = False
        self._named: dict[tuple[str, str, str], _Named] = {}
        self._streams: list[Stream] = []
        self._warm: WarmSessions | None = None
        self._group: asyncio.TaskGroup | None = None
        self.by_model = {name: ModelStatistics() for name in self._models}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Accept requests while the block runs."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._warm = WarmSessions(self._open, self._spawn)
            looking = group.create_task(self._look())
            try:
                yield
            finally:
                self._draining = True
                looking.cancel()
                for named in self._named.values():
                    named.session.cancel()
                self._warm.cancel()
                self._group = None

    def drain(self) -> None:
        """Accept no more requests; those under way go on."""
        self._draining = True

    @property
    def sessions(self) -> int:
        """Sessions that are open now."""
        return (
            (self._warm.count if self._warm is not None else 0)
            + len(self._named)
            + sum(not stream.rests for stream in self._streams)
        )

    # --- the port ----------------------------------------------------------------------------------------------------

    def models(self) -> Sequence[ModelInfo]:
        """The served models."""
        return [served.info for served in self._models.values()]

    def model(self, name: str, version: str = "") -> ModelInfo:
        """One served model. Raises `ServingError` (`NOT_FOUND`)."""
        return self._served(name, version).info

    def live(self) -> bool:
        """Whether the process works."""
        return True

    def ready(self) -> bool:
        """Whether a request for any model would be accepted now."""
        return self._group is not None and not self._draining and self._is_ready()

    def statistics(self, name: str = "") -> Sequence[Mapping[str, Any]]:
        """The statistics of one model or of all."""
        wanted = [self._served(name, "")] if name else self._models.values()
        return [self.by_model[served.info.name].report(served.info) for served in wanted]

    async def infer(self, request: InferRequest) -> InferResponse:
        """Compute. Raises `ServingError`. Cancelling the call cancels the task."""
        return await self._counted(request, self._computed)

    # --- streams -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def stream(self, model: str, version: str, terms: RequestTerms, keep: Keep) -> AsyncIterator[Stream]:
        """A session for the requests of one connection. Raises `ServingError` where none can be opened."""
        served = self._served(model, version)
        self._require_ready()
        plan = self._submissions.plan_terms(served.info.name, terms)
        stream = Stream(self, lambda: self._open(plan, _session_terms(terms), keep))
        self._streams.append(stream)
        try:
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    await stream.session.ready()
            except UnansweredError as error:
                raise refusal(error) from None
            except TimeoutError:
                raise ServingError(Fault.UNAVAILABLE, "the session was not placed in time") from None
            yield stream
        finally:
            self._streams.remove(stream)
            if not stream.rests:
                self._part_from(stream.session)

    async def infer_in(self, session: DeviceSession, request: InferRequest) -> InferResponse:
        """Compute in a given session. Raises `ServingError`."""

        async def compute(request: InferRequest, served: ServedModel, samples: int) -> _Computed:
            if samples > 1 and session.keep is Keep.LATEST:
                raise ServingError(
                    Fault.INVALID, f"{samples} samples in one frame: a stream that keeps only the latest takes one"
                )
            split = served.split(request.inputs, samples)
            try:
                return await self._pushed(session, split, self._limit_s(request))
            except UnansweredError as error:
                raise refusal(error) from None

        return await self._counted(request, compute)

    @property
    def draining(self) -> bool:
        """Whether no more requests are accepted."""
        return self._draining

    # --- one request -------------------------------------------------------------------------------------------------

    async def _counted(
        self,
        request: InferRequest,
        compute: Callable[[InferRequest, ServedModel, int], Coroutine[Any, Any, _Computed]],
    ) -> InferResponse:
        served = self._served(request.model, request.version)
        statistics = self.by_model[served.info.name]
        clock = exact_clock()
        began_s = clock()
        statistics.pending += 1
        try:
            self._require_ready()
            samples = samples_of(request, served.info)
            found = await compute(request, served, samples)
            outputs = _joined(served, found.results, request.outputs)
        except asyncio.CancelledError:
            statistics.cancelled += 1
            raise
        except BaseException:
            statistics.fail(clock() - began_s)
            raise
        finally:
            statistics.pending -= 1
        total_s = clock() - began_s
        predicted_s = found.placed.delay_s if found.placed is not None else total_s
        statistics.succeed(samples, total_s, found.wait_s or max(0.0, total_s - predicted_s))
        return InferResponse(
            model=served.info.name,
            version=served.info.version,
            id=request.id,
            outputs=outputs,
            parameters=_parameters(found, total_s),
        )

    async def _computed(self, request: InferRequest, served: ServedModel, samples: int) -> _Computed:
        terms = request.terms
        plan = self._submissions.plan_terms(served.info.name, terms)
        split = served.split(request.inputs, samples)
        limit_s = self._limit_s(request)
        try:
            if terms.session is not None:
                return await self._in_named(request, plan, split, limit_s)
            if terms.mode is Mode.SESSION or (
                terms.mode is Mode.AUTO and self._options.sessions and samples <= MAX_SESSION_SAMPLES
            ):
                found = await self._in_warm(plan, split, limit_s, must=terms.mode is Mode.SESSION)
                if found is not None:
                    return found
            self.by_model[served.info.name].tasks += 1
            return await self._as_task(plan, split, terms.timeout_s, limit_s)
        except UnansweredError as error:
            raise refusal(error) from None

    async def _in_warm(
        self, plan: PlanTerms, split: list[list[Array]], limit_s: float, *, must: bool
    ) -> _Computed | None:
        """Compute in a warm session; None where there is none, and the request can be a task."""
        assert self._warm is not None
        while True:
            session = self._warm.session(plan, len(split))
            if session is None:
                if must:
                    raise ServingError(
                        Fault.UNAVAILABLE,
                        f"no session can be opened now: the planner refused one, or {MAX_WARM} are open",
                        retry_after_s=RETRY_AFTER_S,
                    )
                return None
            try:
                return await self._pushed(session, split, limit_s)
            except SessionEndedError as error:
                self._warm.ended(plan, session)
                if error.cause == "closed" and not self._draining:
                    continue  # closed between two requests
                # As tasks of their own, only the request that the model cannot compute fails.
                alone = session.placed is None or not error.repeatable
                if alone and not must and not self._draining:
                    return None
                raise

    async def _in_named(
        self, request: InferRequest, plan: PlanTerms, split: list[list[Array]], limit_s: float
    ) -> _Computed:
        """Compute in the session that the client names; open it at its start, close it at its end."""
        terms = request.terms
        assert terms.session is not None
        key = (request.client, request.model, terms.session)
        named = self._named.get(key)
        if terms.session_start:
            if named is not None:
                self._spawn(_ended(named.session), "close session")
            elif sum(client == request.client for client, _, _ in self._named) >= MAX_NAMED:
                raise ServingError(
                    Fault.BUSY, f"this client has {MAX_NAMED} sessions already", retry_after_s=RETRY_AFTER_S
                )
            wanted = _session_terms(terms)
            named = self._named[key] = _Named(plan, wanted, self._open(plan, wanted), 0.0)
        if named is None:
            raise ServingError(
                Fault.INVALID, f"there is no session {terms.session!r}: its first request needs sequence_start"
            )
        named.used_s = asyncio.get_running_loop().time()
        session = named.session
        try:
            return await self._pushed(session, split, limit_s)
        except SessionEndedError:
            # not where another request of this session has done so
            if self._named.get(key) is named and named.session is session and not self._draining:
                named.session = self._open(named.plan, named.terms)  # for the requests that follow
            raise
        finally:
            if terms.session_end and self._named.get(key) is named:
                del self._named[key]
                self._spawn(_ended(named.session), "close session")

    async def _pushed(self, session: DeviceSession, split: list[list[Array]], limit_s: float) -> _Computed:
        """The answers of a session. Raises `UnansweredError`, `ServingError` (`DEADLINE`)."""
        answers: list[asyncio.Future[list[Array]]] = []
        try:
            answers.extend(map(session.push, split))
            if not all(answer.done() for answer in answers):
                async with asyncio.timeout(limit_s):
                    await asyncio.gather(*answers)
            return _Computed([answer.result() for answer in answers], session.placed)
        except TimeoutError:
            raise _late(limit_s) from None
        finally:
            for answer in answers:
                answer.cancel()

    async def _as_task(
        self, plan: PlanTerms, split: list[list[Array]], deadline_s: float | None, limit_s: float
    ) -> _Computed:
        """The results of a task of its own. Raises `UnansweredError`, `ServingError` (`DEADLINE`)."""
        task = self._device().submit(self._submissions.task(plan, len(split), deadline_s), split)
        try:
            async with asyncio.timeout(limit_s):
                results = await task.result()
        except TimeoutError:
            raise _late(limit_s) from None
        finally:
            task.cancel()  # without effect where the results are here
        done = task.completed
        if done is None:
            return _Computed(results, task.placed)
        return _Computed(results, task.placed, done.measured, done.delay_s, done.wait_s)

    # --- its parts ---------------------------------------------------------------------------------------------------

    def _served(self, name: str, version: str) -> ServedModel:
        served = self._models.get(name)
        if served is None:
            raise ServingError(
                Fault.NOT_FOUND,
                f"there is no model {name!r:.100}; this endpoint serves {', '.join(self._models) or 'none'}",
            )
        if version not in ("", served.info.version):
            raise ServingError(
                Fault.NOT_FOUND, f"model {name} has no version {version!r:.50}; it has {served.info.version}"
            )
        return served

    def _require_ready(self) -> None:
        if not self.ready():
            words = "the device drains" if self._draining else "the device is not ready"
            raise ServingError(Fault.UNAVAILABLE, words, retry_after_s=RETRY_AFTER_S)

    def _limit_s(self, request: InferRequest) -> float:
        return request.terms.timeout_s or self._options.timeout_s

    def _open(self, plan: PlanTerms, terms: SessionTerms, keep: Keep = Keep.ALL) -> DeviceSession:
        return self._device().open_session(self._submissions.session(plan, terms), keep)

    def _part_from(self, session: DeviceSession) -> None:
        """End a session whose client is gone."""
        if session.waiting or session.under_way:
            session.cancel()
        else:
            self._spawn(_ended(session), "close session")

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        if self._group is None:
            work.close()
            return
        self._group.create_task(work, name=what)

    async def _look(self) -> None:
        """Close idle sessions, and adapt the others to their measured rates."""
        assert self._warm is not None
        while True:
            await asyncio.sleep(LOOK_S)
            self._warm.look()
            for key, named in list(self._named.items()):
                if _is_idle(named.session, named.used_s):
                    del self._named[key]
                    self._spawn(_ended(named.session), "close idle session")
            for stream in self._streams:
                if not stream.rests and _is_idle(stream.session, stream.used_s):
                    stream.rests = True
                    self._spawn(_ended(stream.session), "close idle session")


class Stream:
    """The session of one connection. If it fails, or was closed because no frames came, the next frame opens another."""

    def __init__(self, inference: DeviceInference, open_session: Callable[[], DeviceSession]) -> None:
        self._inference = inference
        self._open = open_session
        self.rests = False  # its session was closed because no frames came
        self._renew()

    def _renew(self) -> None:
        self.session = self._open()
        self.opened_s = self.used_s = asyncio.get_running_loop().time()

    @property
    def dropped(self) -> int:
        """Frames that a newer one replaced."""
        return self.session.dropped

    async def infer(self, request: InferRequest) -> InferResponse:
        """Compute one frame. Raises `ServingError`."""
        self.used_s = asyncio.get_running_loop().time()
        # A session that the planner refused is not followed by another one at once.
        refused = self.session.placed is None and self.used_s < self.opened_s + REFUSED_S
        if (self.rests or (self.session.abandoned and not refused)) and not self._inference.draining:
            self.rests = False
            self._renew()
        return await self._inference.infer_in(self.session, request)


def _session_terms(terms: RequestTerms) -> SessionTerms:
    return SessionTerms(rate_hz=terms.rate_hz or DEFAULT_RATE_HZ, latency_s=terms.latency_s)


def _is_idle(session: DeviceSession, used_s: float) -> bool:
    """Whether no request has come for `IDLE_S`, and none waits for its answer."""
    idle_s = asyncio.get_running_loop().time() - used_s
    return idle_s >= IDLE_S and not session.waiting and not session.under_way


async def _ended(session: DeviceSession) -> None:
    """Close a session when its frames are answered."""
    with contextlib.suppress(UnansweredError):
        await session.close()


def _late(limit_s: float) -> ServingError:
    return ServingError(Fault.DEADLINE, f"no answer within {limit_s:g} s")


def _joined(served: ServedModel, results: Sequence[Sequence[Array]], wanted: Sequence[str]) -> list[Any]:
    try:
        return served.joined(results, wanted)
    except ValueError:
        raise ServingError(
            Fault.INVALID, "the outputs of these samples differ in shape: send the samples one by one"
        ) from None


def _parameters(found: _Computed, total_s: float) -> dict[str, Any]:
    """Placement, attempt, predicted and measured times, as scalars."""
    placed = found.placed
    if placed is None:
        return {}
    placement = placed.placement
    return {
        "deepar_kind": placement.kind.value,
        "deepar_edge": placement.edge or "",
        "deepar_cuts": f"{placement.cut1},{placement.cut2}",
        **_codecs(placement),
        "deepar_attempt": placed.attempt,
        "deepar_mode": "request" if placed.session is None else "session",
        "deepar_predicted_s": placed.delay_s,
        "deepar_measured_s": total_s if found.delay_s is None else found.delay_s,
        **_parts("predicted", placed.parts),
        **({} if found.measured is None else _parts("measured", found.measured)),
    }


def _codecs(placement: Placement) -> dict[str, str]:
    """The codecs of both links where samples are encoded; of several routes, those of each that encodes."""
    coded = [route for route in placement.routes or () if (route.codec1, route.codec2) != (Codec.RAW, Codec.RAW)]
    named = dict.fromkeys(f"{route.codec1.value},{route.codec2.value}" for route in coded)
    return {"deepar_codecs": " ".join(named)} if named else {}


def _parts(word: str, parts: Parts) -> dict[str, float]:
    """The parts that are not 0."""
    return {f"deepar_{word}_{part}_s": value for part in DELAY_PARTS if (value := getattr(parts, f"{part}_s"))}
