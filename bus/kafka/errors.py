"""Translation of aiokafka's errors to `BusError`."""

from __future__ import annotations

from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    KafkaError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
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
    if isinstance(error, KafkaError) and not error.retriable:
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
