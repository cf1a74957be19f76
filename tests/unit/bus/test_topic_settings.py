"""What the settings of topics must be follows from the table of topics, and every difference names its repair."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from bus import topic_settings, topics
from bus.errors import ConfigError
from bus.memory.bus import MemoryBus
from bus.port import FoundTopic
from bus.topic_settings import PARTITIONS, contradictions, created_with, needed_bytes, require
from bus.topics import Partitions, TopicSpec
from deploy.services.wiring import require_region
from loadgen.sim.virtual_loop import run_virtual

KAFKAS_DEFAULTS = {
    "cleanup.policy": "delete",
    "retention.ms": "604800000",
    "retention.bytes": "-1",
    "max.message.bytes": "1048588",
    "segment.bytes": "1073741824",
    "segment.ms": "604800000",
    "compression.type": "producer",
    "message.timestamp.type": "CreateTime",
    "message.timestamp.after.max.ms": "3600000",
    "min.insync.replicas": "1",
}


def found(spec: TopicSpec, changed: Mapping[str, str] | None = None, *, copies: int = 1) -> FoundTopic:
    """A topic as `create_topics` makes it, with some settings changed."""
    settings = KAFKAS_DEFAULTS | created_with(spec) | dict(changed or {})
    return FoundTopic(spec.name, "here:9092", spec.partitions, copies, settings)


SPECS = {spec.name: spec for spec in topics.specs(["e1"], Partitions(regions=3))}


def test_what_is_created_is_what_is_demanded() -> None:
    assert contradictions(map(found, SPECS.values())) == []


def test_what_older_kafka_does_not_know_is_left_out_and_only_warned_of() -> None:
    assert all("message.timestamp.after.max.ms" not in created_with(spec, older_kafka=True) for spec in SPECS.values())
    aged = [
        found(spec)._replace(settings=KAFKAS_DEFAULTS | created_with(spec, older_kafka=True)) for spec in SPECS.values()
    ]
    assert {one.key for one in contradictions(aged)} == {"message.timestamp.after.max.ms"}
    require(aged)


@pytest.mark.parametrize(
    ("topic", "key", "value", "repair"),
    [
        ("deepar.decisions", "retention.ms", "60000", "-1"),
        ("deepar.decisions", "retention.ms", "99999999999", "-1"),
        ("deepar.decisions", "retention.bytes", "1073741824", "-1"),
        ("deepar.decisions", "cleanup.policy", "compact", "delete"),
        ("deepar.snapshots", "cleanup.policy", "delete", "compact"),
        ("deepar.nodes", "cleanup.policy", "compact,delete", "compact"),
        ("deepar.tasks", "retention.ms", "3600000", "604800000"),
        ("deepar.results", "retention.ms", "1000", "3600000"),
        ("deepar.activations.e1", "retention.bytes", "1000000", str(4 << 30)),
        ("deepar.activations.cloud", "max.message.bytes", "100000", str(needed_bytes("deepar.activations.cloud"))),
        ("deepar.events", "segment.bytes", "100000", str(needed_bytes("deepar.events"))),
        ("deepar.results", "compression.type", "zstd", "producer"),
    ],
)
def test_each_setting_that_loses_or_refuses_records_is_refused(topic: str, key: str, value: str, repair: str) -> None:
    wrong = [found(spec, {key: value} if spec.name == topic else {}) for spec in SPECS.values()]
    with pytest.raises(ConfigError) as refused:
        require(wrong)
    assert f"{topic} has {key}={value}, required is {repair}" in str(refused.value) or key == "compression.type"
    assert refused.value.remedy is not None
    assert "deepar topics repair" in refused.value.remedy
    command = f"kafka-configs.sh --bootstrap-server here:9092 --alter --entity-type topics --entity-name {topic}"
    assert f"{command} --add-config {key}={repair}" in refused.value.remedy
    repaired = [found(spec, {key: repair} if spec.name == topic else {}) for spec in SPECS.values()]
    require(repaired)


@pytest.mark.parametrize(
    ("topic", "key", "value"),
    [
        ("deepar.tasks", "retention.ms", "-1"),
        ("deepar.tasks", "retention.ms", "9999999999"),
        ("deepar.results", "retention.bytes", "-1"),
        ("deepar.nodes", "retention.ms", "1000"),  # it is compacted: nothing is deleted by age
        ("deepar.results", "compression.type", "gzip"),
        ("other.topic", "retention.ms", "1"),
    ],
)
def test_what_keeps_more_or_is_not_ours_is_let_pass(topic: str, key: str, value: str) -> None:
    spec = SPECS.get(topic, TopicSpec(topic, 1))
    assert contradictions([found(spec, {key: value})]) == []


def test_fewer_regions_than_another_control_topic_has_are_refused_and_can_be_added() -> None:
    uneven = [found(spec)._replace(partitions=1 if name == topics.TASKS else 3) for name, spec in SPECS.items()]
    (one,) = contradictions(uneven)
    assert (one.topic, one.key, one.found, one.repair, one.fatal) == (topics.TASKS, PARTITIONS, "1", "3", True)
    assert one.command == "kafka-topics.sh --bootstrap-server here:9092 --alter --topic deepar.tasks --partitions 3"


def test_more_copies_demanded_than_there_are_is_only_warned_of() -> None:
    spec = SPECS[topics.TASKS]
    (one,) = contradictions([found(spec, {"min.insync.replicas": "3"}, copies=2)])
    assert (one.key, one.repair, one.fatal) == ("min.insync.replicas", "2", False)
    require([found(spec, {"min.insync.replicas": "3"}, copies=2)])


def test_what_this_user_may_not_see_is_taken_as_right() -> None:
    hidden = [found(spec)._replace(settings={}) for spec in SPECS.values()]
    assert contradictions(hidden) == []


def test_a_service_does_not_start_on_a_topic_that_is_set_wrong() -> None:
    async def main() -> None:
        async with MemoryBus() as bus:
            await bus.create_topics([TopicSpec(topics.DECISIONS, 1, retention_s=60)])
            with pytest.raises(ConfigError, match=r"deepar\.decisions has retention\.ms=60000, required is -1"):
                await require_region(bus, 0)

    run_virtual(main())


def test_a_service_does_not_start_on_control_topics_of_different_sizes() -> None:
    async def main() -> None:
        async with MemoryBus() as bus:
            await bus.create_topics([TopicSpec(topics.EVENTS, 2)])
            with pytest.raises(ConfigError, match=r"deepar\.decisions has partitions=1, required is 2"):
                await require_region(bus, 0)

    run_virtual(main())


def test_every_rule_says_what_goes_wrong_otherwise() -> None:
    for name in SPECS:
        rules = topic_settings.rules(name)
        assert all(rule.why for rule in rules)
        assert len({rule.key for rule in rules}) == len(rules)


def test_what_is_deleted_by_age_has_the_age_that_the_broker_says() -> None:
    """A board without a clock of its own begins in 1970: what it submits must not be deleted as fifty years old."""
    stamped = {name: created_with(spec)["message.timestamp.type"] for name, spec in SPECS.items()}
    by_age = {
        name for name, spec in SPECS.items() if not spec.compacted and spec.retention_s >= 0 and name != topics.EVENTS
    }
    assert {name for name, kind in stamped.items() if kind == "LogAppendTime"} == by_age
    assert by_age >= {topics.TASKS, topics.RESULTS, topics.ACTIVATIONS_CLOUD, "deepar.activations.e1"}
