"""Access control lists for Kafka by role, derived from the table of topics, and their installation on a broker.

Patterns are literal: a prefixed `deepar.activations.e1` would open `deepar.activations.e10` too. Kafka's lists cannot
check the sender that a record claims inside a topic with several writers; `docs/security.md` covers that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.admin import CreateAclsRequest, CreateAclsRequestStruct

from bus import topics
from bus.errors import BusError, BusUnavailableError, ConfigError
from bus.kafka.connection import KafkaConnection
from planner.service.region_group import PLANNER_GROUP

EDGE = "edge"
ADMIN = "admin"
NODES_AND_TOOLS = ("planner", "device", EDGE, "cloud", "loadgen", "tools")


class Resource(StrEnum):
    """The type of resource of an entry, as Kafka names it."""

    TOPIC = "TOPIC"
    GROUP = "GROUP"
    CLUSTER = "CLUSTER"


class Operation(StrEnum):
    """The allowed operation, as Kafka names it. Read and Write imply Describe."""

    READ = "READ"
    WRITE = "WRITE"
    CREATE = "CREATE"
    DESCRIBE = "DESCRIBE"
    DESCRIBE_CONFIGS = "DESCRIBE_CONFIGS"


# Numbers of Kafka's protocol, from its Java classes ResourceType, AclOperation, PatternType and AclPermissionType.
_RESOURCE_CODE = {Resource.TOPIC: 2, Resource.GROUP: 3, Resource.CLUSTER: 4}
_OPERATION_CODE = {Operation.READ: 3, Operation.WRITE: 4, Operation.CREATE: 5, Operation.DESCRIBE: 8}
_OPERATION_CODE[Operation.DESCRIBE_CONFIGS] = 10
_LITERAL, _ALLOW, _ANY_HOST = 3, 3, "*"


@dataclass(frozen=True, slots=True, order=True)
class AclEntry:
    """One entry of a list: an allowed operation. Everything without an entry is denied."""

    resource: Resource
    name: str
    operation: Operation


def edge_group(edge: str) -> str:
    """The consumer group of an edge; only that edge may join it."""
    return f"deepar.edge.{edge}"


def roles(edges: Sequence[str] = ()) -> dict[str, list[AclEntry]]:
    """The minimum entries of every role. With `edges`, each edge has its own role `edge:NAME` and devices may send to these
    edges; without, the entries contain the placeholder `<edge>`. Raises ConfigError for a reserved name.
    """
    for edge in edges:
        if edge in topics.RESERVED_EDGE_NAMES:
            raise ConfigError(f"an edge cannot be named {edge}: the name is reserved for a topic")
    named = tuple(edges) or (topics.EDGE_PLACEHOLDER,)
    found: dict[str, list[AclEntry]] = {}
    for role in NODES_AND_TOOLS:
        if role == EDGE and edges:
            found |= {f"{EDGE}:{edge}": _entries(EDGE, (edge,)) for edge in edges}
        else:
            found[role] = _entries(role, named)
    every = [spec.name for spec in topics.specs()]
    every += [topics.ACTIVATIONS_EDGE.replace(topics.EDGE_PLACEHOLDER, edge) for edge in named]
    found[ADMIN] = sorted(
        AclEntry(Resource.TOPIC, name, operation)
        for name in every
        for operation in (Operation.CREATE, Operation.DESCRIBE)
    )
    return found


def _entries(role: str, edges: Iterable[str]) -> list[AclEntry]:
    """Entries from the rows of the table that name this role, and for its consumer group."""
    found: set[AclEntry] = set()
    for row in topics.TABLE:
        names = [row.name]
        if topics.EDGE_PLACEHOLDER in row.name:
            names = [row.name.replace(topics.EDGE_PLACEHOLDER, edge) for edge in edges]
        for name in names:
            if role in row.readers:
                found.add(AclEntry(Resource.TOPIC, name, Operation.READ))
            if role in row.writers:
                found.add(AclEntry(Resource.TOPIC, name, Operation.WRITE))
            if role in row.readers or role in row.writers:
                found.add(
                    AclEntry(Resource.TOPIC, name, Operation.DESCRIBE_CONFIGS)
                )  # needed to check the settings of topics
    if role == EDGE:
        found |= {AclEntry(Resource.GROUP, edge_group(edge), Operation.READ) for edge in edges}
    if role == "cloud":
        found.add(AclEntry(Resource.GROUP, topics.CLOUD_GROUP, Operation.READ))
    if role == "planner":
        found.add(AclEntry(Resource.GROUP, PLANNER_GROUP, Operation.READ))
    return sorted(found)


def for_users(users: Mapping[str, str], edges: Sequence[str] = ()) -> dict[str, list[AclEntry]]:
    """The entries of each user; `users` maps names to roles of `roles(edges)`. Raises ConfigError for another role."""
    known = roles(edges)
    found = {}
    for user, role in users.items():
        if role not in known:
            raise ConfigError(f"{user}={role}: unknown role", remedy=f"roles: {', '.join(known)}")
        if any(topics.EDGE_PLACEHOLDER in entry.name for entry in known[role]):
            raise ConfigError(f"{user}={role}: the role depends on the edges", remedy="name every edge with --edge")
        found[user] = known[role]
    return found


def as_commands(granted: Mapping[str, Sequence[AclEntry]], bootstrap: str) -> list[str]:
    """The entries as calls of Kafka's `kafka-acls.sh`."""
    lines = []
    for user, entries in granted.items():
        for entry in entries:
            about = "--cluster" if entry.resource is Resource.CLUSTER else f"--{entry.resource.lower()} '{entry.name}'"
            lines.append(
                f"kafka-acls.sh --bootstrap-server {bootstrap} --command-config admin.properties --add"
                f" --allow-principal 'User:{user}' --operation {_as_word(entry.operation)} {about}"
            )
    return lines


def _as_word(operation: Operation) -> str:
    """The operation as Kafka's tools write it, e.g. DescribeConfigs."""
    return "".join(part.capitalize() for part in operation.split("_"))


class _CreateMany(CreateAclsRequest):  # type: ignore[misc]
    """Request with many entries; aiokafka's own request class takes one."""

    def __init__(self, granted: Mapping[str, Sequence[AclEntry]]) -> None:
        self._lines = [
            (
                _RESOURCE_CODE[entry.resource],
                entry.name,
                _LITERAL,
                f"User:{user}",
                _ANY_HOST,
                _OPERATION_CODE[entry.operation],
                _ALLOW,
            )
            for user, entries in granted.items()
            for entry in entries
        ]

    def build(self, request_struct_class: type[CreateAclsRequestStruct]) -> CreateAclsRequestStruct:
        """Build the request for protocol version 1 or later; version 0 (Kafka 1) does not support patterns."""
        if request_struct_class.API_VERSION < 1:
            raise BusError("the broker does not support access control lists with patterns; use Kafka 2 or later")
        return request_struct_class(self._lines)


async def apply(connection: KafkaConnection, granted: Mapping[str, Sequence[AclEntry]]) -> int:
    """Add the entries on the broker of every site and return the number of entries per site. Existing entries stay.

    The user of `connection` must be a super user or have the permission Alter on the cluster. Raises BusError with the
    broker's cause.
    """
    return max([await _apply(connection, servers, granted) for servers in connection.sites])


async def _apply(connection: KafkaConnection, servers: str, granted: Mapping[str, Sequence[AclEntry]]) -> int:
    request: Any = _CreateMany(granted)
    await connection.check(servers)
    admin = AIOKafkaAdminClient(**connection.client_settings(servers))
    try:
        await admin.start()
        response = await admin._send_request(request)
    except KafkaError as error:
        raise BusUnavailableError(f"the access control lists cannot be set: {error!r}") from error
    finally:
        await admin.close()
    for code, message in response.creation_responses:
        if code:
            raise BusError(
                f"the broker rejected the access control lists: {message or for_code(code).__name__}",
                remedy="add the user to super.users of the broker, and set its authorizer.class.name",
            )
    return len(response.creation_responses)
