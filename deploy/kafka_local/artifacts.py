"""The jars that Apache Kafka runs from, fetched once by Maven into the user's cache folder.

Which jars, and the SHA-256 of each, is in `deploy/kafka/pom.xml` and `deploy/kafka/jars.sha256`. A folder of
jars appears under its final name only when it is complete and every hash is right, so a fetch that was
interrupted leaves nothing that could be mistaken for one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from bus.errors import ConfigError, DeeparError

KAFKA_VERSION = "4.3.0"
JAVA_MINIMUM = 17
SETTINGS_DIR = Path(__file__).parents[1] / "kafka"
FETCH_LIMIT_S = 900.0

Progress = Callable[[str], None]


class MissingProgramError(ConfigError):
    """A program that a broker needs is not installed: `program` is its name."""

    def __init__(self, program: str, message: str, *, remedy: str) -> None:
        super().__init__(message, remedy=remedy)
        self.program = program


class ArtifactsError(DeeparError):
    """The jars could not be fetched, or are not the ones that are pinned."""


def cache_root() -> Path:
    """The folder for what can be fetched again: DEEPAR_CACHE_DIR, or the platform's cache folder."""
    return Path(os.environ.get("DEEPAR_CACHE_DIR") or platformdirs.user_cache_dir("deepar"))


def find_java() -> tuple[Path, str]:
    """The `java` to run and its version, e.g. "17.0.15"; JAVA_HOME comes before PATH.

    Raises MissingProgramError when there is none, or it is older than JAVA_MINIMUM.
    """
    remedy = (
        f"install a Java runtime, version {JAVA_MINIMUM} or newer (Debian: "
        "apt-get install openjdk-17-jre-headless; macOS: brew install openjdk@17), "
        "or name a running broker in KAFKA_BOOTSTRAP_SERVERS"
    )
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which("java")
    if found is None:
        raise MissingProgramError("java", "Apache Kafka needs Java, and there is no `java` on PATH", remedy=remedy)
    said = subprocess.run([found, "-version"], capture_output=True, text=True, timeout=60, check=False)
    version = re.search(r'version "([^"]+)"', said.stderr + said.stdout)
    if said.returncode != 0 or version is None:
        # macOS ships a `java` that only says where to get one.
        raise MissingProgramError("java", f"{found} does not run: {said.stderr.strip()[:200]}", remedy=remedy)
    first, _, rest = version[1].partition(".")
    major = rest.partition(".")[0] if first == "1" else first  # Java 8 calls itself 1.8
    if int(re.match(r"\d+", major)[0]) < JAVA_MINIMUM:  # type: ignore[index]
        raise MissingProgramError("java", f"{found} is Java {version[1]}: Kafka needs {JAVA_MINIMUM}", remedy=remedy)
    return Path(found), version[1]


def pinned_jars() -> dict[str, str]:
    """SHA-256 (hex) by file name, of every jar in the class path."""
    lines = (SETTINGS_DIR / "jars.sha256").read_text(encoding="ascii").split()
    return dict(zip(lines[1::2], lines[0::2], strict=True))


def jars_dir() -> Path:
    """Where the jars are, or will be."""
    return cache_root() / f"kafka-{KAFKA_VERSION}"


def have_jars() -> bool:
    """Whether all the jars are there already (then Maven is not needed)."""
    folder = jars_dir()
    return folder.is_dir() and {p.name for p in folder.glob("*.jar")} == set(pinned_jars())


def find_maven() -> Path:
    """The `mvn` to run. Raises MissingProgramError when there is none."""
    found = shutil.which("mvn")
    if found is None:
        raise MissingProgramError(
            "mvn",
            "Kafka's jars are fetched by Maven, and there is no `mvn` on PATH",
            remedy="install Maven (Debian: apt-get install maven; macOS: brew install maven), needed once "
            "per machine, or name a running broker in KAFKA_BOOTSTRAP_SERVERS",
        )
    return Path(found)


def ensure_jars(progress: Progress | None = None) -> Path:
    """The folder of jars, fetched if it does not exist (44 MB, about 10 s).

    `progress` gets a line for a person a few times a second. Raises MissingProgramError without Maven,
    ArtifactsError when Maven fails or a jar is not the pinned one.
    """
    target = jars_dir()
    if have_jars():
        return target
    maven = find_maven()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        jars = work / "jars"
        _run_maven(maven, jars, progress or (lambda line: None))
        check_jars(jars)
        if target.exists() and not have_jars():
            shutil.rmtree(target)  # left by another version of the pinned list
        try:
            jars.rename(target)
        except OSError:
            if not have_jars():  # otherwise another process has put them there
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def check_jars(folder: Path) -> None:
    """Raises ArtifactsError unless `folder` holds exactly the pinned jars."""
    pinned = pinned_jars()
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.jar")}
    wrong = sorted(name for name in pinned.keys() | found.keys() if pinned.get(name) != found.get(name))
    if wrong:
        raise ArtifactsError(
            f"{len(wrong)} of Kafka's jars are missing, unexpected or altered: {', '.join(wrong[:5])}",
            remedy="delete ~/.m2/repository/org/apache/kafka and try again; if it stays, do not run them",
        )


def _run_maven(maven: Path, out: Path, progress: Progress) -> None:
    """Copies the runtime class path into `out`."""
    total = len(pinned_jars())
    # -C refuses a download whose checksum is wrong; the project file is copied so that nothing is written
    # beside it.
    pom = out.parent / "pom.xml"
    shutil.copyfile(SETTINGS_DIR / "pom.xml", pom)
    command = [
        str(maven), "-B", "-C", "-f", str(pom), "dependency:copy-dependencies", "-DincludeScope=runtime",
        f"-DoutputDirectory={out}",
    ]  # fmt: skip
    progress(f"fetching Apache Kafka {KAFKA_VERSION} with Maven (once, 44 MB)")
    fetched: set[str] = set()
    lines: list[str] = []
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        assert child.stdout is not None
        names = pinned_jars()
        for line in child.stdout:
            lines.append(line.rstrip())
            name = re.search(r"(?:Downloaded from|Copying) .*?([\w.+-]+\.jar)", line)
            if name and name[1] in names and name[1] not in fetched:
                fetched.add(name[1])
                progress(f"fetching Apache Kafka {KAFKA_VERSION}: {len(fetched)} of {total} jars ({name[1]})")
        code = child.wait(FETCH_LIMIT_S)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()  # type: ignore[union-attr]
    if code != 0:
        errors = [line for line in lines if "ERROR" in line] or lines[-1:] or ["it said nothing"]
        raise ArtifactsError(
            f"Maven could not fetch Apache Kafka {KAFKA_VERSION}: {errors[0][:400]}",
            remedy="see that this machine reaches a Maven repository (a mirror goes into ~/.m2/settings.xml) "
            "and try again",
        )
