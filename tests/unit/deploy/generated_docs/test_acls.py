"""Access control lists: derived from the table of topics, least privilege, literal names."""

from __future__ import annotations

import pytest

from bus import topics
from bus.errors import ConfigError
from deploy.generated_docs import acls
from deploy.generated_docs.acls import AclEntry, Operation, Resource


def allowed(entries: list[AclEntry], operation: Operation) -> set[str]:
    return {entry.name for entry in entries if entry.resource is Resource.TOPIC and entry.operation is operation}


def test_only_the_planner_decides() -> None:
    for role, entries in acls.roles(["e1", "e2"]).items():
        assert (topics.DECISIONS in allowed(entries, Operation.WRITE)) is (role == "planner"), role
        assert (topics.SNAPSHOTS in allowed(entries, Operation.WRITE)) is (role == "planner"), role


def test_an_edge_reads_its_own_topic_with_its_own_group_only() -> None:
    roles = acls.roles(["e1", "e10"])
    for edge, other in (("e1", "e10"), ("e10", "e1")):
        entries = roles[f"edge:{edge}"]
        assert topics.activations_topic(edge) in allowed(entries, Operation.READ)
        assert topics.activations_topic(other) not in {entry.name for entry in entries}
        groups = [entry.name for entry in entries if entry.resource is Resource.GROUP]
        assert groups == [f"deepar.edge.{edge}"]


def test_a_device_may_send_to_the_edges_named_and_reads_nothing_there() -> None:
    device = acls.roles(["e1", "e2"])["device"]
    assert {"deepar.activations.e1", "deepar.activations.e2"} <= allowed(device, Operation.WRITE)
    assert not {name for name in allowed(device, Operation.READ) if name.startswith("deepar.activations")}


def test_tools_only_read_and_the_admin_only_creates() -> None:
    roles = acls.roles(["e1"])
    assert {entry.operation for entry in roles["tools"]} == {Operation.READ, Operation.DESCRIBE_CONFIGS}
    assert {entry.operation for entry in roles["admin"]} == {Operation.CREATE, Operation.DESCRIBE}
    assert allowed(roles["admin"], Operation.CREATE) == {spec.name for spec in topics.specs(["e1"])}


def test_every_row_of_the_table_is_granted_to_those_it_names_and_to_no_other() -> None:
    roles = acls.roles()
    for row in topics.TABLE:
        for operation, named in ((Operation.READ, row.readers), (Operation.WRITE, row.writers)):
            granted = {role for role, entries in roles.items() if row.name in allowed(entries, operation)}
            assert granted == set(named), (row.name, operation)


def test_users_get_the_list_of_their_role() -> None:
    granted = acls.for_users({"anna": "tools", "x": "edge:e1"}, ["e1"])
    assert granted["x"] == acls.roles(["e1"])["edge:e1"]
    commands = acls.as_commands(granted, "broker:9093")
    assert len(commands) == sum(map(len, granted.values()))
    assert all("--resource-pattern-type" not in command for command in commands)  # literal is the default
    assert any("'User:x' --operation DescribeConfigs --topic 'deepar.nodes'" in command for command in commands)
    assert any("'User:x' --operation Read --group 'deepar.edge.e1'" in command for command in commands)


@pytest.mark.parametrize(
    ("users", "edges", "said"),
    [
        ({"a": "king"}, [], "unknown role"),
        ({"a": "edge"}, [], "the role depends on the edges"),
        ({"a": "device"}, [], "the role depends on the edges"),
        ({"a": "edge:e2"}, ["e1"], "unknown role"),
        ({"a": "tools"}, ["cloud"], "reserved for a topic"),
    ],
)
def test_what_is_wrong_is_named(users: dict[str, str], edges: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        acls.for_users(users, edges)
