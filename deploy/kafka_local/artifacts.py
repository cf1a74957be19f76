"""The jars that Apache Kafka runs from, fetched once by Maven into the user's cache folder.

`deploy/kafka/pom.xml` and `deploy/kafka/jars.sha256` pin the jars and their SHA-256. The folder of jars gets its final name
only when it is complete and every hash matches, so an interrupted fetch leaves no folder that looks complete.
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
    """The folder for files that can be fetched again: DEEPAR_CACHE_DIR, or the platform's cache folder."""
    return Path(os.environ.get("DEEPAR_CACHE_DIR") or platformdirs.user_cache_dir("deepar"))


def find_java() -> tuple[Path, str]:
    """The path of `java` and its version, e.g. "17.0.15"; JAVA_HOME comes before PATH.

    Raises MissingProgramError if there is no Java, or it is older than JAVA_MINIMUM.
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
        # macOS has a `java` that only prints where to download Java.
        raise MissingProgramError("java", f"{found} does not run: {said.stderr.strip()[:200]}", remedy=remedy)
    first, _, rest = version[1].partition(".")
    major = rest.partition(".")[0] if first == "1" else first  # Java 8 calls itself 1.8
    if int(re.match(r"\d+", major)[0]) < JAVA_MINIMUM:  # type: ignore[index]
        raise MissingProgramError("java", f"{found} is Java {version[1]}: Kafka needs {JAVA_MINIMUM}", remedy=remedy)
    return Path(found), version[1]


def pinned_jars(settings_dir: Path = SETTINGS_DIR) -> dict[str, str]:
    """File name -> SHA-256 (hex) of every jar in the class path."""
    lines = (settings_dir / "jars.sha256").read_text(encoding="ascii").split()
    return dict(zip(lines[1::2], lines[0::2], strict=True))


def jars_dir() -> Path:
    """The cache folder of the jars; it may not exist yet."""
    return cache_root() / f"kafka-{KAFKA_VERSION}"


def have_jars(settings_dir: Path = SETTINGS_DIR) -> bool:
    """Whether all jars are in the cache, so that Maven is not needed."""
    folder = jars_dir()
    return folder.is_dir() and {p.name for p in folder.glob("*.jar")} == set(pinned_jars(settings_dir))


def find_maven() -> Path:
    """The path of `mvn`. Raises MissingProgramError if it is not installed."""
    found = shutil.which("mvn")
    if found is None:
        raise MissingProgramError(
            "mvn",
            "Kafka's jars are fetched by Maven, and there is no `mvn` on PATH",
            remedy="install Maven (Debian: apt-get install maven; macOS: brew install maven), needed once "
            "per machine, or name a running broker in KAFKA_BOOTSTRAP_SERVERS",
        )
    return Path(found)


def ensure_jars(progress: Progress | None = None, settings_dir: Path = SETTINGS_DIR) -> Path:
    """Return the folder of jars, fetching them if they are missing (44 MB, about 10 s).

    `progress` receives a status line a few times a second; `settings_dir` holds `pom.xml` and `jars.sha256`. Raises
    MissingProgramError without Maven, ArtifactsError if Maven fails or a jar differs from the pinned one.
    """
    target = jars_dir()
    if have_jars(settings_dir):
        return target
    maven = find_maven()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        jars = work / "jars"
        _run_maven(maven, jars, progress or (lambda line: None), settings_dir)
        check_jars(jars, settings_dir)
        if target.exists() and not have_jars(settings_dir):
            shutil.rmtree(target)  # left by another version of the pinned list
        try:
            jars.rename(target)
        except OSError:
            if not have_jars(settings_dir):  # otherwise another process has put them there
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def check_jars(folder: Path, settings_dir: Path = SETTINGS_DIR) -> None:
    """Check that `folder` holds exactly the pinned jars. Raises ArtifactsError."""
    pinned = pinned_jars(settings_dir)
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.jar")}
    wrong = sorted(name for name in pinned.keys() | found.keys() if pinned.get(name) != found.get(name))
    if wrong:
        raise ArtifactsError(
            f"{len(wrong)} of Kafka's jars are missing, unexpected or altered: {', '.join(wrong[:5])}",
            remedy="delete ~/.m2/repository/org/apache/kafka and try again; if the error remains, do not run these jars",
        )


def _run_maven(maven: Path, out: Path, progress: Progress, settings_dir: Path) -> None:
    """Copy the runtime class path into `out`."""
    names = pinned_jars(settings_dir)
    # -C rejects a download with a wrong checksum. Maven works on a copy of the project file and writes beside that copy.
    pom = out.parent / "pom.xml"
    shutil.copyfile(settings_dir / "pom.xml", pom)
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
        for line in child.stdout:
            lines.append(line.rstrip())
            name = re.search(r"(?:Downloaded from|Copying) .*?([\w.+-]+\.jar)", line)
            if name and name[1] in names and name[1] not in fetched:
                fetched.add(name[1])
                progress(f"fetching Apache Kafka {KAFKA_VERSION}: {len(fetched)} of {len(names)} jars ({name[1]})")
        code = child.wait(FETCH_LIMIT_S)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()  # type: ignore[union-attr]
    if code != 0:
        errors = [line for line in lines if "ERROR" in line] or lines[-1:] or ["no output"]
        raise ArtifactsError(
            f"Maven could not fetch Apache Kafka {KAFKA_VERSION}: {errors[0][:400]}",
            remedy="check that this machine reaches a Maven repository (configure a mirror in ~/.m2/settings.xml) "
            "and try again",
        )
