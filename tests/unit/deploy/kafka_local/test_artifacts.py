"""What the launcher does before there is a broker: programs missing or old, jars missing or altered."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from deploy.kafka_local import artifacts
from deploy.kafka_local.artifacts import (
    ArtifactsError,
    MissingProgramError,
    ensure_jars,
    find_java,
    find_maven,
    jars_dir,
)

JARS = {"kafka_2.13-9.jar": b"kafka", "slf4j-9.jar": b"log"}


def _program(folder: Path, name: str, script: str) -> None:
    """An executable that pretends to be `name`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH besides /bin; no Java home; an empty cache."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def settings_dir(tmp_path: Path) -> Path:
    """A settings folder that pins two small files instead of Kafka's 46 jars."""
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "pom.xml").write_text("<project/>")
    pinned = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in JARS.items()]
    (settings / "jars.sha256").write_text("".join(pinned))
    return settings


def _maven(programs: Path, *, slf4j: str = "log", end: int = 0) -> None:
    """A stand-in for Maven that copies both jars into the folder of its arguments."""
    _program(
        programs,
        "mvn",
        'for a in "$@"; do case $a in -DoutputDirectory=*) out=${a#*=};; esac; done\n'
        "/bin/mkdir -p $out\n"
        "printf kafka > $out/kafka_2.13-9.jar; echo '[INFO] Downloaded from x: https://x/kafka_2.13-9.jar'\n"
        f"printf {slf4j} > $out/slf4j-9.jar; echo '[INFO] Downloaded from x: https://x/slf4j-9.jar'\n"
        f"[ {end} = 0 ] || echo '[ERROR] Could not transfer artifact'; exit {end}",
    )


def test_no_java_says_what_to_install(programs: Path) -> None:
    with pytest.raises(MissingProgramError) as caught:
        find_java()
    assert caught.value.program == "java"
    assert "openjdk-17" in str(caught.value.remedy)
    assert "KAFKA_BOOTSTRAP_SERVERS" in str(caught.value.remedy)


@pytest.mark.parametrize("said", ['openjdk version "11.0.2" 2019-01-15', 'java version "1.8.0_292"'])
def test_an_old_java_is_refused(programs: Path, said: str) -> None:
    _program(programs, "java", f"echo '{said}' >&2")
    with pytest.raises(MissingProgramError, match="Kafka needs 17"):
        find_java()


@pytest.mark.parametrize(
    ("said", "version"),
    [('openjdk version "17.0.15" 2025-04-15', "17.0.15"), ('openjdk version "25" x', "25")],
)
def test_a_new_java_is_found(programs: Path, said: str, version: str) -> None:
    _program(programs, "java", f"echo '{said}' >&2")
    assert find_java() == (programs / "java", version)


def test_a_java_that_only_advertises_is_refused(programs: Path) -> None:
    _program(
        programs,
        "java",
        "echo 'The operation could not be completed. Unable to locate a Java Runtime.' >&2; exit 1",
    )
    with pytest.raises(MissingProgramError, match="does not run: The operation"):
        find_java()


def test_java_home_comes_first(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(programs, "java", "echo 'openjdk version \"17\"' >&2")
    (tmp_path / "home").mkdir()
    _program(tmp_path / "home" / "bin", "java", "echo 'openjdk version \"21\"' >&2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert find_java()[1] == "21"


def test_no_maven_says_what_to_install(programs: Path) -> None:
    with pytest.raises(MissingProgramError) as caught:
        find_maven()
    assert caught.value.program == "mvn"
    assert "apt-get install maven" in str(caught.value.remedy)


def test_jars_are_fetched_once(programs: Path, settings_dir: Path) -> None:
    _maven(programs)
    lines: list[str] = []
    folder = ensure_jars(lines.append, settings_dir)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == JARS
    assert [line for line in lines if "2 of 2" in line]
    (programs / "mvn").unlink()
    assert ensure_jars(settings_dir=settings_dir) == folder == jars_dir()


def test_an_altered_jar_is_never_put_in_place(programs: Path, settings_dir: Path) -> None:
    _maven(programs, slf4j="evil")
    with pytest.raises(ArtifactsError, match=r"1 of Kafka's jars .*slf4j-9\.jar"):
        ensure_jars(settings_dir=settings_dir)
    assert list(jars_dir().parent.iterdir()) == []


def test_a_maven_that_fails_is_quoted_and_leaves_nothing(programs: Path, settings_dir: Path) -> None:
    _maven(programs, end=1)
    with pytest.raises(ArtifactsError, match="Could not transfer artifact"):
        ensure_jars(settings_dir=settings_dir)
    assert list(jars_dir().parent.iterdir()) == []


def test_jars_of_another_list_are_replaced(programs: Path, settings_dir: Path) -> None:
    jars_dir().mkdir(parents=True)
    (jars_dir() / "kafka_2.13-8.jar").write_bytes(b"old")
    _maven(programs)
    assert {p.name for p in ensure_jars(settings_dir=settings_dir).iterdir()} == set(JARS)


def test_every_pinned_jar_has_a_hash_and_kafka_is_the_version_named() -> None:
    pinned = artifacts.pinned_jars()
    assert f"kafka_2.13-{artifacts.KAFKA_VERSION}.jar" in pinned
    assert all(len(digest) == 64 for digest in pinned.values())
    assert f"<kafka.version>{artifacts.KAFKA_VERSION}<" in (artifacts.SETTINGS_DIR / "pom.xml").read_text()
