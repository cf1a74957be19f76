"""The parameters of a request."""

from __future__ import annotations

from typing import Any

import pytest

from bus.messages import SessionTerms
from bus.values import Role
from stages.serving.submission import Submissions
from stages.serving.terms import request_terms
from stages.serving.values import Fault, Mode, RequestTerms, ServingError


def test_no_parameters_and_foreign_ones_mean_the_defaults() -> None:
    assert request_terms({}) == request_terms({"binary_data_output": True, "headers": "x"}) == RequestTerms()


def test_every_parameter_is_read() -> None:
    assert request_terms(
        {
            "timeout": 1_500_000,
            "priority": 1,
            "max_link1_bps": 8_000_000,
            "max_link2_bps": 0,
            "min_agreement": 0.99,
            "placement": "cloud, device",
            "deepar_mode": "request",
            "sequence_id": 7,
            "sequence_start": True,
            "sequence_end": False,
            "rate_hz": 30,
            "latency_s": 0.05,
        }
    ) == RequestTerms(
        timeout_s=1.5,
        priority=1,
        max_link1_bps=8_000_000,
        max_link2_bps=0,
        min_agreement=0.99,
        tiers=(Role.DEVICE, Role.CLOUD),
        mode=Mode.REQUEST,
        session="7",
        session_start=True,
        rate_hz=30.0,
        latency_s=0.05,
    )


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"timeout": 0, "priority": 0, "sequence_id": 0}, RequestTerms()),  # Triton's defaults
        ({"sequence_id": "", "sequence_start": True, "placement": ""}, RequestTerms()),
        ({"timeout": "250000", "min_agreement": "0.5"}, RequestTerms(timeout_s=0.25, min_agreement=0.5)),
        ({"placement": "-cloud"}, RequestTerms(tiers=(Role.DEVICE, Role.EDGE))),
        ({"placement": "device+edge"}, RequestTerms(tiers=(Role.DEVICE, Role.EDGE))),
        ({"placement": "cloud + edge"}, RequestTerms(tiers=(Role.EDGE, Role.CLOUD))),
        ({"placement": "-cloud,-edge"}, RequestTerms(tiers=(Role.DEVICE,))),
        ({"sequence_id": "camera", "sequence_end": True}, RequestTerms(session="camera", session_end=True)),
    ],
)
def test_other_spellings(parameters: dict[str, Any], expected: RequestTerms) -> None:
    assert request_terms(parameters) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", -1),
        ("timeout", 1.5),
        ("timeout", "soon"),
        ("timeout", True),
        ("timeout", 10**30),
        ("timeout", "9" * 5000),
        ("timeout", 10**400),
        ("rate_hz", 10**400),
        ("rate_hz", 1_000_001),
        ("min_agreement", -(10**400)),
        ("priority", 1_001),
        ("max_link1_bps", (1 << 50) + 1),
        ("priority", []),
        ("max_link1_bps", float("nan")),
        ("max_link2_bps", float("inf")),
        ("min_agreement", 1.01),
        ("min_agreement", "nan"),
        ("rate_hz", 0),
        ("latency_s", -1),
        ("placement", "moon"),
        ("placement", "device,-cloud"),
        ("placement", "-device,-edge,-cloud"),
        ("placement", ","),
        ("deepar_mode", "fast"),
        ("placement", 3),
        ("sequence_id", 1.5),
        ("sequence_id", True),
        ("sequence_id", "x" * 129),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ServingError, match=f"parameter '{name}'") as refused:
        request_terms({name: value})
    assert refused.value.fault is Fault.INVALID
    assert len(str(refused.value)) < 300


def test_the_largest_values_fit_into_a_task_and_a_session() -> None:
    largest = {"priority": 1_000, "max_link1_bps": 1 << 50, "max_link2_bps": 1 << 50, "timeout": 2**62}
    terms = request_terms(largest | {"rate_hz": 1e6, "latency_s": 2**62})
    submissions = Submissions("d")
    plan = submissions.plan_terms("m", terms)
    assert submissions.task(plan, 1, terms.timeout_s).priority == 1_000
    assert terms.rate_hz is not None
    session = SessionTerms(rate_hz=terms.rate_hz, latency_s=terms.latency_s)
    assert submissions.session(plan, session).session == session


@pytest.mark.parametrize("flag", ["sequence_start", "sequence_end"])
def test_a_flag_of_a_session_is_true_or_false(flag: str) -> None:
    with pytest.raises(ServingError, match=flag):
        request_terms({"sequence_id": 1, flag: "yes"})
