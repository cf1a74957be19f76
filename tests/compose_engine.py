"""A Docker engine with Compose for the tests, also where nothing can be pulled.

An engine that answers is used as it is, with the base images that the Dockerfiles name. Otherwise, as root on Debian, one is
started in a corner of its own: own data, socket and network (no default bridge), base images made by debootstrap, Compose
built from its Go module. What takes minutes (engine's data with images and build cache, Compose's binary) stays in the
user's cache folder; to free it, stop the tests and delete `docker-engine` and `docker-compose-*` there.

DEEPAR_TEST_DOCKER=required installs what is missing with apt-get and makes the lack of an engine a failure; without it,
nothing is installed and the tests that need an engine are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deploy.kafka_local.artifacts import cache_root
from deploy.kafka_local.child_process import tied_to_us
from stages.models.files.cache import locked
from tests.class_archive import QUICK_COMPILER

COMPOSE_VERSION = "2.32.4"
SUITE = "bookworm"
ROOT_IMAGE, PYTHON_BASE, MAVEN_BASE = (f"deepar-ci/{name}:{SUITE}" for name in ("root", "python", "maven"))
TRUST_STORES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/java/cacerts")
REPOSITORY = Path(__file__).parents[1]
COMPOSE_FILE = REPOSITORY / "deploy" / "docker-compose.yml"
# Short, for the sockets in it have at most 108 bytes; and the same in every run, to find an engine that was left over.
RUN_DIR = Path("/run/deepar-docker")

Say = Callable[[str], None]


class NoEngineError(Exception):
    """No engine can be had here; the message says what is missing."""


class CommandError(AssertionError):
    """A command that had to succeed did not; the message carries the end of its output."""


def required() -> bool:
    """Whether the lack of an engine is a failure, and programs may be installed."""
    return os.environ.get("DEEPAR_TEST_DOCKER") == "required"


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    limit_s: float = 600,
    check: bool = True,
    cwd: Path | None = None,
) -> str:
    """Standard output and error of a command. Raises CommandError when it fails or exceeds `limit_s`."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"`{' '.join(words)}` did not end within {limit_s:.0f} s") from error
    if check and done.returncode != 0:
        raise CommandError(f"`{' '.join(words)}` ended with code {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


class Engine:
    """A running engine: `docker(...)` and `compose(...)` run their commands on it."""

    def __init__(
        self, docker: Path, compose: Sequence[str | Path], env: Mapping[str, str], child: subprocess.Popen[bytes] | None
    ) -> None:
        self.own = child is not None
        self._docker = docker
        self._compose = list(compose)
        self._env = dict(env)
        self._child = child
        self._overrides: dict[tuple[Path, ...], Path] = {}  # one for each set of compose files

    def docker(self, *words: str | Path, limit_s: float = 600, check: bool = True) -> str:
        """Output of `docker WORDS`."""
        return run([self._docker, *words], env=self._env, limit_s=limit_s, check=check)

    def compose(
        self,
        *words: str,
        files: Sequence[Path] = (COMPOSE_FILE,),
        env: Mapping[str, str] | None = None,
        limit_s: float = 600,
        check: bool = True,
    ) -> str:
        """Output of `docker compose -f FILES WORDS`; base images and builds are those that this engine can have."""
        chosen = list(files)
        if self.own:
            if (key := tuple(files)) not in self._overrides:
                self._overrides[key] = self._build_override(files)
            chosen.append(self._overrides[key])
        named = [word for file in chosen for word in ("-f", file)]
        return run([*self._compose, *named, *words], env={**self._env, **(env or {})}, limit_s=limit_s, check=check)

    def stop(self) -> None:
        """Ends the engine if it is ours; its containers end with it."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(60)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        for path in self._overrides.values():
            path.unlink(missing_ok=True)
        self._overrides.clear()

    def _build_override(self, files: Sequence[Path]) -> Path:
        """A compose file with the changes that tests need, to be read after `files`.

        Images are built on the host's network, as there is no bridge, and get its package sources as secrets. Brokers run
        without Java's slow compiler, since they live only for seconds.
        """
        said = run(
            [*self._compose, *(w for f in files for w in ("-f", f)), "config", "--format", "json"], env=self._env
        )
        services = json.loads(said[said.index("{") :])["services"]
        sources = {"pip_conf": _pip_conf(), "maven_settings": Path.home() / ".m2" / "settings.xml"}
        secrets = {name: {"file": str(path)} for name, path in sources.items() if path and path.exists()}
        build = {"network": "host", "secrets": list(secrets)}
        changes: dict[str, dict[str, Any]] = {n: {"build": build} for n, s in services.items() if "build" in s}
        for name in services:
            if "broker" in name:
                changes.setdefault(name, {})["environment"] = {"JDK_JAVA_OPTIONS": QUICK_COMPILER}
        override = {"secrets": secrets, "services": changes}
        path = RUN_DIR / f"build-{os.getpid()}-{len(self._overrides)}.json"
        path.write_text(json.dumps(override))
        return path


def _pip_conf() -> Path | None:
    """The configuration that pip uses on this machine."""
    places = [os.environ.get("PIP_CONFIG_FILE"), Path.home() / ".config" / "pip" / "pip.conf", "/etc/pip.conf"]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def start(say: Say = lambda line: None) -> Engine:
    """An engine with Compose and base images. Raises NoEngineError (what is missing) or CommandError (what failed)."""
    here = shutil.which("docker")
    if here and _answers(here, {}):
        return Engine(Path(here), _compose({}, say), {}, None)
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NoEngineError("no Docker engine answers, and only root on Linux can start one")
    _install({"dockerd": "docker.io", "debootstrap": "debootstrap", "iptables": "iptables"}, say)
    if not required() and not (_root_tar().exists() and _compose_found({})):
        raise NoEngineError("no Docker engine answers, and what is needed to start one has not been built")
    with ThreadPoolExecutor() as pool:  # two slow things that do not need each other
        root = pool.submit(_debootstrap, say)
        compose = pool.submit(_compose, {}, say)
        env = {"DOCKER_HOST": f"unix://{RUN_DIR}/docker.sock", "DOCKER_BUILDKIT": "1"}
        # Debian's client builds with the engine's own BuildKit; a newer one would want a plugin.
        docker = (
            Path("/usr/bin/docker") if Path("/usr/bin/docker").exists() else Path(shutil.which("docker") or "docker")
        )
        root_tar, compose_command = root.result(), compose.result()
    engine = Engine(docker, compose_command, env, _dockerd(docker, env, say))
    try:
        _remove_leftovers(engine)
        _base_images(engine, root_tar, say)
    except BaseException:
        engine.stop()
        raise
    return engine


def base_images(engine: Engine) -> dict[str, str]:
    """Variables of the compose file that name base images: none where the defaults can be pulled."""
    if not engine.own:
        return {}
    return {
        "DEEPAR_BASE_IMAGE": PYTHON_BASE,
        "DEEPAR_KAFKA_BUILD_BASE_IMAGE": MAVEN_BASE,
        "DEEPAR_KAFKA_BASE_IMAGE": MAVEN_BASE,
    }


def _answers(docker: str | Path, env: Mapping[str, str]) -> bool:
    try:
        run([docker, "version", "--format", "{{.Server.Version}}"], env=env, limit_s=20)
    except (CommandError, OSError):
        return False
    return True


def _install(programs: Mapping[str, str], say: Say) -> None:
    """Sees that every program is there, or installs its Debian package where that is allowed."""
    missing = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if not missing:
        return
    if not required() or shutil.which("apt-get") is None:
        raise NoEngineError(f"no Docker engine answers, and {', '.join(missing)} is not installed")
    say(f"installing {', '.join(missing)}")
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    with packages_locked():
        run(["apt-get", "update", "-q"], env=env)
        run(["apt-get", "install", "-qy", "--no-install-recommends", *missing], env=env)


@contextlib.contextmanager
def packages_locked() -> Iterator[None]:
    """A lock between test processes: two that use apt-get at the same time disturb each other."""
    cache_root().mkdir(parents=True, exist_ok=True)
    with locked(cache_root() / "apt-get"):
        yield


def _root_tar() -> Path:
    return cache_root() / "docker-engine" / f"{SUITE}.tar"


def _compose_binary() -> Path:
    return cache_root() / f"docker-compose-{COMPOSE_VERSION}"


def _compose_found(env: Mapping[str, str]) -> list[str | Path] | None:
    """The command of a Compose version 2 that is there: docker's plugin, one on PATH, or one built before."""
    for command in (["docker", "compose"], ["docker-compose"], [_compose_binary()]):
        try:
            if run([*command, "version", "--short"], env=env, limit_s=20).strip().lstrip("v").startswith("2"):
                return list(command)
        except (CommandError, OSError):
            continue
    return None


def _compose(env: Mapping[str, str], say: Say) -> list[str | Path]:
    """The command of Compose version 2; built now if it is missing."""
    found = _compose_found(env)
    if found is not None:
        return found
    if not required() or shutil.which("go") is None:
        raise NoEngineError("Docker Compose version 2 is not installed")
    say(f"building Docker Compose {COMPOSE_VERSION} (once, 1-3 minutes)")
    module, built = "github.com/docker/compose/v2", _compose_binary()
    with tempfile.TemporaryDirectory() as work:
        build = {
            "GOPATH": f"{work}/path",
            "GOCACHE": f"{work}/cache",
            "GOBIN": f"{work}/bin",
            "GOFLAGS": "-modcacherw -buildvcs=false",
        }
        flags = f"-s -w -X {module}/internal.Version=v{COMPOSE_VERSION}"
        run(["go", "install", "-ldflags", flags, f"{module}/cmd@v{COMPOSE_VERSION}"], env=build, limit_s=900)
        built.parent.mkdir(parents=True, exist_ok=True)
        part = built.with_suffix(".part")
        shutil.copy2(Path(work) / "bin" / "cmd", part)  # the program is called after its folder
    part.replace(built)
    return [built]


def _debootstrap(say: Say) -> Path:
    """A root file system with Python, as a tar file: what `python:3.11-slim` is elsewhere."""
    tar = _root_tar()
    if not tar.exists():
        say("making a base image with debootstrap (once, 1 minute)")
        tar.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            root = Path(work) / "root"
            packages = "--include=python3,python3-venv,ca-certificates"
            run(["debootstrap", "--variant=minbase", packages, SUITE, root], limit_s=900)
            part = tar.with_suffix(".part")
            run(["tar", "-C", root, "-cf", part, "--exclude=./var/cache/apt/archives/*.deb", "."])
        part.replace(tar)
    return tar


def _dockerd(docker: Path, env: Mapping[str, str], say: Say) -> subprocess.Popen[bytes]:
    """Starts the engine and waits until it answers."""
    say("starting a Docker engine")
    RUN_DIR.mkdir(parents=True, exist_ok=True)
    data = cache_root() / "docker-engine"
    if _answers(docker, env):
        raise NoEngineError(f"another test run has an engine at {RUN_DIR}")
    command = ["dockerd", "--data-root", str(data / "data"), "--exec-root", str(RUN_DIR / "exec")]
    command += ["-H", env["DOCKER_HOST"], "--pidfile", str(RUN_DIR / "pid"), "--bridge", "none"]
    with (data / "dockerd.log").open("wb") as log:
        child = subprocess.Popen(
            tied_to_us(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if _answers(docker, env):
            return child
        time.sleep(0.2)
    child.terminate()
    child.wait()
    tail = (data / "dockerd.log").read_text(errors="replace").splitlines()[-5:]
    raise NoEngineError("dockerd does not start on this machine: " + " | ".join(tail))


def _base_images(engine: Engine, root: Path, say: Say) -> None:
    """Builds the base images; what has not changed comes out of the engine's cache.

    They trust the authorities that this machine trusts, for its mirror may have one of its own.
    """
    if not engine.docker("images", "-q", ROOT_IMAGE).strip():
        say(f"importing {ROOT_IMAGE}")
        engine.docker("import", root, ROOT_IMAGE)
    say("building the base images")
    install = "apt-get update -q && apt-get install -qy --no-install-recommends openjdk-17-jre-headless maven"
    trusted = [path for path in map(Path, TRUST_STORES) if path.exists()]
    with tempfile.TemporaryDirectory() as context:
        for path in trusted:
            shutil.copyfile(path, Path(context) / path.name)
        for name, steps in {PYTHON_BASE: [], MAVEN_BASE: [f"RUN {install} && rm -rf /var/lib/apt/lists/*"]}.items():
            lines = [f"FROM {ROOT_IMAGE}", *steps, *(f"COPY {path.name} {path}" for path in trusted)]
            (Path(context) / "Dockerfile").write_text("\n".join(lines) + "\n")
            engine.docker("build", "--network", "host", "-t", name, context)


def _remove_leftovers(engine: Engine) -> None:
    """Containers of a run that was cut off would start again with the engine."""
    left = engine.docker("ps", "--all", "--quiet").split()
    if left:
        engine.docker("rm", "--force", "--volumes", *left)
    engine.docker("network", "prune", "--force")
    engine.docker("volume", "prune", "--force")
