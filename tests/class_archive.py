"""An archive of the classes that Apache Kafka loads: with it, a broker starts in two thirds of the processor time.

It is made once, in 10-15 s, and stays in the user's cache folder. A test run starts some forty brokers.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import mock

from deploy.kafka_local.artifacts import KAFKA_VERSION, cache_root, find_java
from deploy.kafka_local.broker import KafkaBroker
from stages.models.files.cache import locked

QUICK_COMPILER = "-XX:TieredStopAtLevel=1"
"""No broker of a test lives long enough for the slow compiler to pay."""
QUIET = "-Xlog:cds=off -Xlog:cds+dynamic=off"
"""Other programs in Java, such as Maven, would say that the archive is not theirs."""
WRITE_LIMIT_S = 120.0


def start_brokers_quickly() -> None:
    """Let every broker that this process or its children start use the archive. Raises what `KafkaBroker.start` raises."""
    os.environ["JDK_JAVA_OPTIONS"] = f"{QUICK_COMPILER} {QUIET} -XX:SharedArchiveFile={_archive()}"


def _archive() -> Path:
    """The path of the archive, which is made if there is none for this Kafka and this Java."""
    _, java = find_java()
    path = cache_root() / f"kafka-{KAFKA_VERSION}-java-{java}.jsa"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if not path.exists():
            _make(path)
    return path


def _make(path: Path) -> None:
    """Run a broker that writes the archive at its end."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / "classes.jsa"
        options = f"{QUICK_COMPILER} {QUIET} -XX:ArchiveClassesAtExit={part}"
        with mock.patch.dict(os.environ, JDK_JAVA_OPTIONS=options):
            broker = KafkaBroker(Path(folder) / "kafka")
            broker.start()
            broker.stop(WRITE_LIMIT_S)
        part.replace(path)
