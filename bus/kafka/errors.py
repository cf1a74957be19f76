"""Translation of aiokafka's errors to `BusError`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    InvalidReplicationFactorError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)

from bus.errors import BusError, BusUnavailableError, MessageTooLargeError, UnknownTopicError

_FORBIDDEN = (TopicAuthorizationFailedError, GroupAuthorizationFailedError, ClusterAuthorizationFailedError)


def translated(error: BaseException, topic: str, *, size_bytes: int = 0, limit_bytes: int | None = None) -> BusError:
    """The `BusError` for an aiokafka error that occurred on `topic`."""
    if isinstance(error, BusError):
        return error
    if isinstance(error, MessageSizeTooLargeError):
        return MessageTooLargeError(topic, size_bytes, limit_bytes)
    if isinstance(error, UnknownTopicOrPartitionError):
        return unknown_topic(topic)
    if isinstance(error, _FORBIDDEN):
        return BusError(f"not allowed on {topic}: {error!r}", remedy="`deepar acls` prints what each role needs")
    if isinstance(error, KafkaError) and not (error.retriable or isinstance(error, KafkaTimeoutError)):
        return BusError(f"{topic}: {error!r}")
    return BusUnavailableError(
        f"the broker of {topic} does not answer: {error!r}",
        remedy="check that it runs and that KAFKA_SECURITY_PROTOCOL is the protocol it uses",
    )


def unknown_topic(topic: str) -> UnknownTopicError:
    """The error for a topic that does not exist or is not visible."""
    return UnknownTopicError(
        f"there is no topic {topic}",
        remedy="`deepar topics create` creates missing topics; with access control lists the topic may exist but be hidden "
        "from this user (`deepar acls`)",
    )


def check_created(answers: Iterable[tuple[Any, ...]], *, enough_brokers: bool) -> None:
    """Check the answers to a request for topics: name, error code and perhaps a message of each.

    `enough_brokers`: the cluster has as many brokers as each topic was to have copies. Then a refusal for lack of brokers is
    temporary: the controller has not heard from one of them for a while.

    Raises `KafkaError` where another try may succeed, else `BusError`.
    """
    for name, code, *message in answers:
        kind = for_code(code)
        few_brokers = kind is InvalidReplicationFactorError
        if kind.retriable or (few_brokers and enough_brokers):  # retriable: another controller is being elected
            raise kind()
        if code != 0 and kind is not TopicAlreadyExistsError:
            remedy = "set DEEPAR_KAFKA_REPLICATION to at most the number of brokers" if few_brokers else None
            raise BusError(
                f"topic {name} cannot be created: {' '.join(filter(None, message)) or kind.__name__}", remedy=remedy
            )
