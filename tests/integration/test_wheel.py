"""The wheel: built from the tree, installed into an empty environment, run away from the checkout.

The environment gets the wheel alone; what DeePar depends on is read from the environment of the tests, so nothing is fetched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("deepar", "bus", "stages", "planner", "loadgen", "deploy")
DATA = (
    "deploy/docker-compose.yml",
    "deploy/example.toml",
    "deploy/kafka/server.properties",
    "deploy/kafka/secure.properties",
    "deploy/kafka/jars.sha256",
    "deploy/kafka/pom.xml",
)


@dataclass(frozen=True)
class Installed:
    """A wheel and where it was installed."""

    wheel: Path
    python: Path
    folder: Path  # an empty one, to run in

    def deepar(self, *words: str, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the command `deepar`, with nothing of the checkout in reach."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DEEPAR_"))}
        return subprocess.run(
            [self.python.with_name("deepar"), *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, built from what git would hand out, in an environment of its own."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        _run("cp", "-r", REPOSITORY / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q")
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", work, source)
    (wheel,) = work.glob("deepar-*.whl")
    _run(sys.executable, "-m", "venv", "--without-pip", work / "empty")
    python = work / "empty" / "bin" / "python"
    _run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The packages around us, but not our own editable install: its finder is a `.pth` file, which is not read from there.
    (site / "around.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (work / "elsewhere").mkdir()
    return Installed(wheel, python, work / "elsewhere")


def _run(*words: str | Path) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_data_is_in_the_wheel_and_tests_are_not(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops - set(ROOMS) == {name for name in tops if name.endswith(".dist-info")}
    assert set(DATA) <= set(names)
    # Whatever a room has, it has in the wheel, whatever its kind.
    there = {
        str(path.relative_to(REPOSITORY))
        for room in ROOMS
        for path in (REPOSITORY / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert "deploy/monitor/ui/icon.svg" in there
    assert not there - set(names)


def test_everything_comes_from_the_wheel(installed: Installed) -> None:
    script = f"import {', '.join(ROOMS)}; print(*(room.__file__ for room in ({', '.join(ROOMS)})))"
    for place in _run(installed.python, "-I", "-c", script).split():
        assert place.startswith(str(installed.python.parents[1])), place


def test_a_folder_of_the_users_with_the_name_of_ours_is_named(installed: Installed, tmp_path: Path) -> None:
    for name in ROOMS[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    started = [str(installed.python), "-m", "deepar", "plan", "lenet"]
    done = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"{tmp_path / 'bus'} hides DeePar's own package `bus`" in done.stderr
    assert "Traceback" not in done.stderr
    # The program `deepar` does not search the folder that it is started in.
    beside = Installed(installed.wheel, installed.python, tmp_path)
    assert beside.deepar("plan", "lenet", "--json").returncode == 0


def test_it_plans_and_simulates(installed: Installed) -> None:
    planned = installed.deepar("plan", "lenet", "--link1", "100Mbps", "--link2", "20Mbps", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["plans"]
    simulated = installed.deepar("simulate", "fig1a", "--json")
    assert simulated.returncode == 0, simulated.stderr
    assert json.loads(simulated.stdout)["figure"] == "fig1a"


def test_it_demonstrates(installed: Installed) -> None:
    done = installed.deepar("demo", "--json", "--policies", "deepar", limit_s=300)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["digits"]["equal_to_whole"]
    assert Path(shown["picture"]).stat().st_size > 1000
