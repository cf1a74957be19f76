"""Answers of a cluster that was asked to create topics."""

from __future__ import annotations

import pytest
from aiokafka.errors import (
    InvalidReplicationFactorError,
    KafkaError,
    NotControllerError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
)

from bus.errors import BusError
from bus.kafka.errors import check_created

CREATED = ("made", 0, None)
FENCED = ("t", InvalidReplicationFactorError.errno, "All brokers are currently fenced")


def test_topics_that_exist_need_no_creation() -> None:
    check_created([CREATED, ("t", TopicAlreadyExistsError.errno, "exists")], enough_brokers=True)


@pytest.mark.parametrize("answer", [("t", NotControllerError.errno, ""), FENCED])
def test_what_may_succeed_later_is_tried_again(answer: tuple[str, int, str]) -> None:
    with pytest.raises(KafkaError):
        check_created([CREATED, answer], enough_brokers=True)


def test_more_copies_than_brokers_are_refused_for_good() -> None:
    with pytest.raises(BusError, match="topic t cannot be created: All brokers") as refused:
        check_created([CREATED, FENCED], enough_brokers=False)
    assert refused.value.remedy is not None
    assert "DEEPAR_KAFKA_REPLICATION" in refused.value.remedy


@pytest.mark.parametrize("message", [(), (None,)])
def test_a_refusal_without_a_message_names_its_kind(message: tuple[None, ...]) -> None:
    with pytest.raises(BusError, match="TopicAuthorizationFailedError"):
        check_created([("t", TopicAuthorizationFailedError.errno, *message)], enough_brokers=True)
