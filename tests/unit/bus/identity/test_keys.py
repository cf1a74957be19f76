"""Keys, proofs and their files: what is tampered with is noticed, and no secret is ever shown."""

from __future__ import annotations

import hashlib
import hmac
import traceback
from pathlib import Path
from typing import Any

import pytest

from bus import topics
from bus.errors import ConfigError, InvariantError, ProtocolError
from bus.identity.frame_keys import ROWS
from bus.identity.keys import (
    IDENTITY_HEADER,
    PROOF_HEADER,
    SPEAKING_ROLES,
    Key,
    Master,
    Speaker,
    load_key,
    load_master,
    satisfy,
    write_secret,
)
from bus.identity.signed_bus import SignedBus, satisfy_region, signed
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.port import Record

MASTER = Master(bytes(range(32)))
D1 = Speaker("device", "d1")
PROVEN_KEY = Master(bytes(range(32)), frames=True).key(D1).to_text()
VALUE = b'{"type":"node_heartbeat","v":1,"node":"d1","incarnation":"i"}'


def record(signer: Key | None = None, /, **changes: Any) -> Record:
    """The record of a heartbeat of d1, signed with d1's key or another one, then changed."""
    headers = (signer or MASTER.key(D1)).headers(topics.EVENTS, 0, "d1", VALUE)
    whole = Record(topics.EVENTS, 0, 7, 0, "d1", VALUE, headers)
    return whole._replace(**changes)


def test_a_proof_says_who_speaks() -> None:
    assert MASTER.speaker(record()) == D1


def test_the_proof_is_what_the_page_says_it_is() -> None:
    """Computed from the description alone, as a stage in another language would."""
    secret = hmac.new(bytes(range(32)), b"deepar identity 1\ndevice:d1", hashlib.sha256).digest()
    text = b"deepar record 1\ndevice:d1\ndeepar.events\n0\n2\nd1" + VALUE
    expected = hmac.new(secret, text, hashlib.sha256).hexdigest()
    assert dict(record().headers) == {IDENTITY_HEADER: b"device:d1", PROOF_HEADER: expected.encode()}


def test_the_page_s_function_and_its_numbers_are_right(tmp_path: Path) -> None:
    page = (Path(__file__).parents[4] / "docs" / "interface.md").read_text(encoding="utf-8")
    section = page.split("## Who speaks")[1].split("\n## ")[0]
    found: dict[str, Any] = {"hmac": hmac, "hashlib": hashlib, "Path": Path}
    exec(section.split("```python\n")[1].split("```")[0], found)  # our own page
    file = tmp_path / "key"
    file.write_text(section.split("    file   ")[1].split("\n")[0], encoding="ascii")
    value = section.split("the bytes of `")[1].split("`")[0].encode()
    headers = found["proof"](str(file), topics.EVENTS, 0, "d1", value)
    assert headers[1] == ("deepar_proof", section.split("    proof  ")[1].split("\n")[0].encode())
    assert load_key(file) == MASTER.key(D1)
    assert MASTER.speaker(Record(topics.EVENTS, 0, 0, 0, "d1", value, tuple(headers))) == D1


def test_the_page_s_proof_of_frames_is_ours(tmp_path: Path) -> None:
    page = (Path(__file__).parents[4] / "docs" / "interface.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {"hmac": hmac, "hashlib": hashlib, "Path": Path}
    exec(page.split("## Who speaks")[1].split("```python\n")[1].split("```")[0], found)  # our own page
    proving = Master(bytes(range(32)), frames=True)
    key, reader = proving.key(D1), proving.key(Speaker("edge", "e1"))
    (tmp_path / "d1.key").write_text(key.to_text())
    topic = topics.activations_topic("e1")
    made = found["frame_proof"](str(tmp_path / "d1.key"), topics.ACTIVATIONS_EDGE, topic, "t1", b"frame")
    assert key.frames is not None
    assert reader.frames is not None
    assert tuple(made) == key.frames.headers(topic, "t1", b"frame")
    assert reader.frames.sender(Record(topic, 0, 0, 0, "t1", b"frame", tuple(made))) == D1
    assert found["proof"](str(tmp_path / "d1.key"), topics.EVENTS, 0, "d1", VALUE) == [*record().headers]


def test_who_reads_frames_on_a_topic_may_not_write_there() -> None:
    """Or it could prove to be another: `bus.identity.frame_keys`."""
    assert ROWS
    for row in ROWS:
        assert not {*row.readers} & {*row.writers}, row.name


def _claiming(name: bytes) -> tuple[tuple[str, bytes], ...]:
    return tuple((header, name if header == IDENTITY_HEADER else content) for header, content in record().headers)


@pytest.mark.parametrize(
    "broken",
    [
        record(topic=topics.NODES),
        record(partition=1),
        record(key="d2"),
        record(key=None),
        record(value=VALUE.replace(b'"d1"', b'"d2"')),
        record(value=VALUE + b" "),
        record(key="d1{", value=VALUE[1:]),  # the same bytes, cut elsewhere
        record(value=None),
        record(headers=()),
        record(headers=record().headers[:1]),
        record(headers=record().headers[1:]),
        record(headers=record().headers * 2),
        record(headers=_claiming(b"device:d2")),
        record(headers=_claiming(b"edge:d1")),
        record(headers=_claiming(b"device:d1\n")),
        record(headers=_claiming(b"\xff\xfe")),
        record(headers=_claiming(b"d" * 1000)),
        record(headers=((IDENTITY_HEADER, b"device:d1"), (PROOF_HEADER, b"0" * 64))),
        record(headers=((IDENTITY_HEADER, b"device:d1"), (PROOF_HEADER, "ä".encode()))),
        record(headers=((IDENTITY_HEADER, b"device:d1"), (PROOF_HEADER, None))),  # Kafka knows headers without content
        record(Master(bytes(32)).key(D1)),
    ],
    ids=lambda one: repr((one.topic, one.partition, one.key, one.headers))[:90],
)
def test_what_was_tampered_with_is_refused(broken: Record) -> None:
    with pytest.raises(ProtocolError) as caught:
        MASTER.speaker(broken)
    assert caught.value.cause == "wrong_identity"


def test_another_may_sign_what_names_d1_and_is_known_by_it() -> None:
    """Whether d2 may say that of d1 is for `bus.identity.authorization` to judge."""
    d2 = Speaker("device", "d2")
    assert MASTER.speaker(record(MASTER.key(d2))) == d2


def test_other_headers_do_not_matter() -> None:
    headers = (("traceparent", b"00-x"), *record().headers, ("traceparent", b"00-y"))
    assert MASTER.speaker(record(headers=headers)) == D1


def test_a_key_for_a_name_that_no_node_can_have_is_not_made() -> None:
    assert SPEAKING_ROLES == ("device", "edge", "cloud", "loadgen")
    for role, name in (
        ("planner", "p"),
        ("tools", "anna"),
        ("device", ""),
        ("device", "a:b"),
        ("edge", "x\n"),
        ("", "x"),
    ):
        with pytest.raises(ConfigError):
            Speaker(role, name)
    with pytest.raises(ConfigError, match="is not a speaker"):
        Speaker.parse("d1")


# --- files and secrets -----------------------------------------------------------------------------------------------


def test_files_are_the_owners_alone_and_never_written_over(tmp_path: Path) -> None:
    master, key = tmp_path / "m", tmp_path / "k"
    write_secret(master, MASTER.to_text())
    write_secret(key, MASTER.key(D1).to_text())
    assert {file.stat().st_mode & 0o777 for file in (master, key)} == {0o600}
    assert load_master(master).fingerprint == MASTER.fingerprint
    assert load_key(key) == MASTER.key(D1)
    before = master.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        write_secret(master, Master.new().to_text())
    assert master.read_bytes() == before
    with pytest.raises(ConfigError, match="No such file"):
        write_secret(tmp_path / "nowhere" / "m", "")


@pytest.mark.parametrize(
    ("text", "load", "said"),
    [
        (MASTER.to_text(), load_key, "the planner's alone"),
        (MASTER.key(D1).to_text(), load_master, "a key, not a master"),
        (MASTER.to_text()[:-4], load_master, "no master"),
        (MASTER.key(D1).to_text().replace("deepar-key-1", "deepar-key-2"), load_key, "no key"),
        (MASTER.key(D1).to_text().replace("device:", "planner:"), load_key, "is not a role"),
        ("secret-é", load_key, "neither a key nor a master"),
        (PROVEN_KEY.splitlines()[0] + "\n", load_key, "is incomplete"),
        ("\n".join(PROVEN_KEY.splitlines()[:-1]) + "\n", load_key, "is incomplete"),
        (PROVEN_KEY.replace(" frames\n", "\n"), load_key, "is incomplete"),
    ],
)
def test_a_file_of_another_kind_is_named_and_not_shown(text: str, load: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        load(file)  # type: ignore[operator]
    told = "".join(traceback.format_exception(caught.value)) + str(caught.value.remedy)
    assert not any(secret in told for secret in (bytes(range(32)).hex()[:-4], MASTER.key(D1).secret.hex(), "secret-é"))


def test_no_secret_is_in_a_repr_or_an_error() -> None:
    key = MASTER.key(D1)
    shown = f"{MASTER!r} {key!r} {key} {SignedBus(MemoryBus(MemoryBroker(), 'x'), key)!r} {MASTER.__dict__.keys()}"
    try:
        MASTER.speaker(record(value=b"?"))
    except ProtocolError as error:
        shown += "".join(traceback.format_exception(error, limit=None)) + repr(error)
    for secret in (bytes(range(32)), key.secret):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
    assert key.headers(topics.EVENTS, 0, "d1", VALUE)[1][1].decode() not in shown
    assert MASTER.fingerprint in shown


def test_masters_and_fingerprints_differ() -> None:
    assert len({Master.new().fingerprint for _ in range(100)}) == 100
    assert MASTER.fingerprint not in MASTER.key(D1).secret.hex()
    assert MASTER.key(D1).secret != MASTER.key(Speaker("edge", "d1")).secret
    with pytest.raises(ConfigError):
        Master(b"short")


# --- the bus that signs ----------------------------------------------------------------------------------------------


async def test_a_signed_bus_signs_claims_and_leaves_the_rest_alone() -> None:
    broker = MemoryBroker()
    async with signed(MemoryBus(broker, "d1"), MASTER.key(D1)) as bus:
        await bus.create_topics(topics.specs(["e1"]))
        await bus.send(topics.EVENTS, VALUE, key="d1", partition=0, headers=(("ours", b"1"),))
        await (await bus.post(topics.EVENTS, memoryview(VALUE), key="d1", partition=0))
        await bus.send(topics.activations_topic("e1"), b"frame", key="t1")
        reader = await bus.reader([(topics.EVENTS, 0), (topics.activations_topic("e1"), 0)], start="start")
        records = [one for _ in range(2) for one in await reader.fetch(timeout_s=0.1)]
        claims = [one for one in records if one.topic == topics.EVENTS]
        assert [MASTER.speaker(one) for one in claims] == [D1, D1]
        assert claims[0].headers[0] == ("ours", b"1")
        assert [one.headers for one in records if one.topic != topics.EVENTS] == [()]
        with pytest.raises(InvariantError):
            await bus.send(topics.EVENTS, VALUE, key="d1")


def test_a_region_that_demands_proofs_tells_who_cannot_give_them() -> None:
    key, plain = MASTER.key(D1), MemoryBus(MemoryBroker(), "x")
    satisfy(None, None, "d1")
    satisfy(None, key, "d1")
    satisfy_region(signed(plain, key), MASTER.fingerprint, "d1")
    with pytest.raises(ConfigError, match="device d1 has no key") as caught:
        satisfy_region(plain, MASTER.fingerprint, "device d1")
    assert "DEEPAR_IDENTITY_KEY_FILE" in str(caught.value.remedy)
    other = Master(bytes(32)).key(D1)
    with pytest.raises(ConfigError, match=f"{MASTER.fingerprint}, and that of device:d1 is of {other.fingerprint}"):
        satisfy_region(signed(plain, other), MASTER.fingerprint, "device d1")
