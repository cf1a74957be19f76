"""The tasks and sessions that requests become, and the errors of those that end without an answer."""

from __future__ import annotations

import itertools
import uuid
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from bus.messages import HandleInput, SessionTerms, TaskSubmitted
from bus.tensors import Array
from bus.values import Role
from stages.devices.endings import SampleFailedError, UnansweredError
from stages.devices.requests import DeviceRequest
from stages.devices.session import DeviceSession, Keep
from stages.serving.limits import RETRY_AFTER_S
from stages.serving.values import Fault, RequestTerms, ServingError

QUEUE_FULL = frozenset({"queue_full", "device_queue_full", "dropped"})
IMPOSSIBLE = frozenset({"never_fits", "unknown_model", "policy_error"})
"""Causes that say that this region cannot serve the request under its terms."""


class ServingDevice(Protocol):
    """What the endpoint uses of a device."""

    def submit(self, submitted: TaskSubmitted, samples: list[list[Array]]) -> DeviceRequest:
        """Submit a task with the given samples."""

    def open_session(self, submitted: TaskSubmitted, keep: Keep = Keep.ALL) -> DeviceSession:
        """Submit a session."""


class PlanTerms(NamedTuple):
    """The part of a request's terms that decides where it may be computed: requests with equal ones share a session."""

    model: str
    max_link1_bps: int | None
    max_link2_bps: int | None
    priority: int | None
    tiers: tuple[Role, ...] | None
    min_agreement: float | None  # that lossy codecs must have


class Submissions:
    """Builds the messages of one device's requests."""

    def __init__(self, device: str, allowed: tuple[Role, ...] | None = None) -> None:
        """`allowed`: the tiers that may compute at most; None: all."""
        self._device = device
        self._allowed = allowed
        self._prefix = f"{device}-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count(1)

    def plan_terms(self, model: str, terms: RequestTerms) -> PlanTerms:
        """The terms of a request. Raises `ServingError` where it allows no tier that this endpoint has."""
        tiers = terms.tiers
        if self._allowed is not None:
            tiers = self._allowed if tiers is None else tuple(tier for tier in tiers if tier in self._allowed)
            if not tiers:
                raise ServingError(
                    Fault.INVALID,
                    f"parameter 'placement': only {', '.join(self._allowed)} compute behind this endpoint",
                )
        return PlanTerms(model, terms.max_link1_bps, terms.max_link2_bps, terms.priority, tiers, terms.min_agreement)

    def task(self, plan: PlanTerms, samples: int, deadline_s: float | None) -> TaskSubmitted:
        """A task of its own for a request."""
        return self._submitted(plan, samples, deadline_s, None)

    def session(self, plan: PlanTerms, terms: SessionTerms) -> TaskSubmitted:
        """A session."""
        return self._submitted(plan, 1, None, terms)

    def _submitted(
        self, plan: PlanTerms, samples: int, deadline_s: float | None, session: SessionTerms | None
    ) -> TaskSubmitted:
        task_id = f"{self._prefix}-{next(self._numbers)}"
        return TaskSubmitted(
            task_id=task_id,
            device=self._device,
            model=plan.model,
            samples=samples,
            input=HandleInput(handle=task_id),
            max_link1_bps=plan.max_link1_bps,
            max_link2_bps=plan.max_link2_bps,
            deadline_s=deadline_s,
            submitted_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            session=session,
            priority=plan.priority,
            tiers=plan.tiers,
            min_agreement=plan.min_agreement,
        )


def refusal(error: UnansweredError) -> ServingError:
    """The error that the client of an unanswered sample gets."""
    cause, detail = error.cause, error.detail or error.cause
    if cause in QUEUE_FULL:
        return ServingError(Fault.BUSY, detail, retry_after_s=RETRY_AFTER_S)
    if cause == "deadline":
        return ServingError(Fault.DEADLINE, detail)
    if cause in IMPOSSIBLE:
        return ServingError(Fault.INVALID, f"{cause}: {detail}")
    if isinstance(error, SampleFailedError) or not error.repeatable:
        return ServingError(Fault.INTERNAL, f"{cause}: {detail}")
    return ServingError(Fault.UNAVAILABLE, f"{cause}: {detail}", retry_after_s=RETRY_AFTER_S)
