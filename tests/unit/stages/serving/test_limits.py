"""What one client and all clients may use at once."""

from __future__ import annotations

import contextlib

import pytest

from stages.serving.limits import Admission, ServingLimits
from stages.serving.values import Fault, ServingError

LIMITS = ServingLimits(
    body_bytes=100, client_requests=2, client_bytes=150, requests=3, bytes=200, body_s=1.0, slowest_bytes_per_s=50
)


@pytest.mark.parametrize(
    ("held", "asked", "words"),
    [
        ([("a", 1), ("a", 1)], ("a", 1), "2 requests of this client"),
        ([("a", 1), ("b", 1), ("c", 1)], ("d", 1), "3 requests are under way"),
        ([("a", 100)], ("a", 51), "150 bytes of this client"),
        ([("a", 100), ("b", 60)], ("c", 41), "200 bytes are under way"),
    ],
)
def test_a_request_over_a_limit_may_be_repeated_and_takes_no_room(
    held: list[tuple[str, int]], asked: tuple[str, int], words: str
) -> None:
    admission = Admission(LIMITS)
    with contextlib.ExitStack() as stack:
        for client, size in held:
            stack.enter_context(admission.admitted(client, size))
        with pytest.raises(ServingError, match=words) as refused, admission.admitted(*asked):
            pass
        assert refused.value.fault is Fault.BUSY
        assert refused.value.retry_after_s
        assert (admission.requests, admission.bytes) == (len(held), sum(size for _, size in held))
    assert admission.requests == admission.bytes == 0
    with admission.admitted(*asked):
        pass


def test_a_growing_body_counts_once() -> None:
    admission = Admission(LIMITS)
    with admission.admitted("a", 10) as claim:
        claim.grow(50)
        claim.grow(40)
        assert admission.bytes == 50
        with pytest.raises(ServingError, match="bytes of this client"):
            claim.grow(151)
        assert admission.bytes == 50
    assert admission.bytes == 0


def test_a_body_over_the_limit_is_too_large() -> None:
    with pytest.raises(ServingError) as refused, Admission(LIMITS).admitted("a", 101):
        pass
    assert refused.value.fault is Fault.TOO_LARGE


def test_a_body_may_take_longer_the_larger_it_is() -> None:
    assert LIMITS.time_for(0) == 1.0
    assert LIMITS.time_for(100) == 3.0
