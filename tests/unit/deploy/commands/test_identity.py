"""`deepar identity` and what looks at its files: keys for those they are of, and no secret on any stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bus.errors import ConfigError
from bus.identity.keys import Key, Master, Speaker, load_key, load_master, write_secret
from deploy.commands.identity import app
from deploy.doctor import identity_checks
from deploy.services.identities import key_of, submitter_of
from deploy.services.settings import DeviceOptions
from deploy.services.up import node_key
from deploy.services.wiring import node_settings

D1 = Speaker("device", "d1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPAR_IDENTITY_MASTER_FILE", raising=False)
    return tmp_path


def secrets_of(folder: Path) -> list[str]:
    """All secrets in the files."""
    return [word for file in folder.iterdir() for word in file.read_text().split() if len(word) == 64]


def test_a_master_its_keys_and_what_is_said_of_them(folder: Path) -> None:
    runner = CliRunner()
    said = [
        runner.invoke(app, words, catch_exceptions=False)
        for words in (
            ["new-master"],
            ["key", "d1", "--role", "device"],
            ["key", "lg", "--role", "loadgen", "--master", "deepar.master", "--out", "lg"],
            ["show", "device-d1.key", "--json"],
            ["show", "deepar.master"],
            ["show", "lg"],
        )
    ]
    assert [result.exit_code for result in said] == [0] * 6
    assert {file.name for file in folder.iterdir()} == {"deepar.master", "device-d1.key", "lg"}
    master = load_master(folder / "deepar.master")
    assert load_key(folder / "device-d1.key") == master.key(D1)
    assert json.loads(said[3].stdout) == {
        "kind": "key",
        "speaker": "device:d1",
        "master": master.fingerprint,
        "frames": False,
    }
    assert said[4].stdout == f"master, master {master.fingerprint}\n"
    assert said[5].stdout == f"key loadgen:lg, master {master.fingerprint}\n"
    assert len(secrets_of(folder)) == 3
    for result in said:
        assert not any(secret in result.output for secret in secrets_of(folder))


def test_a_master_that_demands_it_makes_keys_for_frames(folder: Path) -> None:
    runner = CliRunner()
    said = [
        runner.invoke(app, words.split())
        for words in (
            "new-master --out m --frames",
            "key e1 --role edge --master m --out e1.key",
            "key lg --role loadgen --master m --out lg.key",
            "show m",
            "show e1.key --json",
            "show lg.key",
        )
    ]
    assert [result.exit_code for result in said] == [0] * 6
    master, e1 = load_master(folder / "m"), load_key(folder / "e1.key")
    assert master.frames
    assert e1 == master.key(Speaker("edge", "e1"))
    assert e1.frames is not None
    assert [*e1.frames.reads] == ["deepar.activations.<edge>"]
    assert [*e1.frames.writes] == ["deepar.activations.cloud", "deepar.results"]
    plain = Master(bytes.fromhex((folder / "m").read_text().split()[1]))
    assert master.fingerprint != plain.fingerprint  # so a node whose key covers no frames is rejected with a reason
    assert said[3].stdout == f"master, master {master.fingerprint}, for frames too\n"
    assert json.loads(said[4].stdout)["frames"] is True
    assert said[5].stdout == f"key loadgen:lg, master {master.fingerprint}\n"  # it sends none
    for result in said:
        assert not any(secret in result.output for secret in secrets_of(folder))


def test_what_cannot_be_made_is_named(folder: Path) -> None:
    runner = CliRunner()
    for words, said in (
        (["key", "d1", "--role", "device"], "No such file"),
        (["key", "p", "--role", "planner", "--master", "m"], "is not a role that can hold a key"),
        (["show", "m.key"], "No such file"),
    ):
        if "m" in words:
            write_secret(folder / "m", Master.new().to_text())
        with pytest.raises(ConfigError, match=said):
            runner.invoke(app, words, catch_exceptions=False)


def test_a_key_serves_only_whom_it_is_of(folder: Path) -> None:
    master = Master.new()
    for speaker in ("device:d1", "edge:e1", "loadgen:lg"):
        write_secret(folder / speaker, master.key(Speaker.parse(speaker)).to_text())
    assert key_of(D1, folder / "device:d1") == master.key(D1)
    assert key_of(D1, None) is None
    assert submitter_of(None) is None
    with pytest.raises(ConfigError, match="holds the key of edge:e1, but this process is device:d1"):
        key_of(D1, folder / "edge:e1")
    assert isinstance(submitter_of(folder / "loadgen:lg"), Key)
    assert isinstance(submitter_of(folder / "device:d1"), Key)
    with pytest.raises(ConfigError, match="edge:e1, which may not submit tasks"):
        submitter_of(folder / "edge:e1")


def test_up_makes_keys_of_its_master_unless_a_node_has_its_own(folder: Path) -> None:
    master, other = Master.new(), Master.new()
    write_secret(folder / "k", other.key(D1).to_text())
    plain, own = DeviceOptions(name="d1"), DeviceOptions(name="d1", identity_key=str(folder / "k"))
    settings = node_settings(plain, region=0, lease_s=1.0)
    assert node_key(settings, plain, None) is None
    assert node_key(settings, plain, master) == master.key(D1)
    assert node_key(settings, own, master) == other.key(D1)


def test_the_doctor_looks_at_the_files(folder: Path) -> None:
    master = Master.new()
    write_secret(folder / "k", master.key(D1).to_text())
    write_secret(folder / "m", master.to_text())
    files = {"DEEPAR_IDENTITY_KEY_FILE": str(folder / "k"), "DEEPAR_IDENTITY_MASTER_FILE": str(folder / "m")}
    look = identity_checks.key_files
    assert look({}) == []
    fine = look(files | {"DEEPAR_NODE": "d1"})
    assert [check.ok for check in fine] == [True, True]
    assert "device:d1" in fine[0].detail
    another = look(files | {"DEEPAR_NODE": "d2"})[0]
    assert (another.ok, another.remedy) == (False, "deepar identity key d2 --role device")
    (folder / "k").chmod(0o644)
    assert "other users of this machine can read it" in look(files)[0].detail
    swapped = look({"DEEPAR_IDENTITY_KEY_FILE": str(folder / "m")})[0]
    assert not swapped.ok
    assert "the planner's alone" in swapped.detail
    told = repr([fine, another, swapped])
    assert not any(secret in told for secret in secrets_of(folder))


def test_the_doctor_compares_with_what_the_region_demands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master, other = Master.new(), Master.new()
    write_secret(folder / "k", other.key(D1).to_text())
    monkeypatch.delenv("DEEPAR_IDENTITY_KEY_FILE", raising=False)
    assert identity_checks.demanded_by_region(0, master.fingerprint) == []
    monkeypatch.setenv("DEEPAR_IDENTITY_KEY_FILE", str(folder / "k"))
    assert identity_checks.demanded_by_region(0, None) == []
    (wrong,) = identity_checks.demanded_by_region(0, master.fingerprint)
    assert not wrong.ok
    assert wrong.detail.endswith(f"ours is of {other.fingerprint}")
    (right,) = identity_checks.demanded_by_region(0, other.fingerprint)
    assert right.ok
