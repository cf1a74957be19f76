"""The house rules: folders, packages, and the imports between rooms."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "deepar": {"deepar", "deploy"},
    "bus": {"bus"},
    "planner": {"bus", "planner"},
    "stages": {"bus", "stages"},
    "loadgen": {"bus", "planner", "stages", "loadgen", "deepar"},
    "deploy": {"bus", "planner", "stages", "loadgen", "deploy", "deepar"},
}
CARD_PACKAGES = {"aiokafka", "msgpack", "numpy", "ai-edge-litert", "uvloop", "structlog"}
FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def nodes_of(path: Path, word: str) -> Iterator[ast.AST]:
    """The syntax of a module; nothing if the word is not in its text, because to parse every file takes seconds."""
    text = path.read_text(encoding="utf-8")
    return ast.walk(ast.parse(text)) if word in text else iter(())


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & (MAY_IMPORT.keys() | {"tests"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imported_rooms(path) <= MAY_IMPORT[room]


def test_the_layering_test_can_fail(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from planner.core.core import PlannerCore\nimport tests\n", encoding="utf-8")
    assert imported_rooms(wrong) == {"planner", "tests"}


JSON_BETWEEN_OURSELVES = {
    "deploy/generated_docs/asyncapi.py",  # a page of the docs
    "deploy/commands/explain.py",  # a record on its way back into our decoder
    "loadgen/experiments/fit_paper.py",  # the profile that is shipped
    "loadgen/experiments/run_key.py",
    "loadgen/experiments/sweep.py",  # the key of a run, compared with itself
    "loadgen/bench/serving/callers.py",  # the bodies of requests that a benchmark sends
    "stages/serving/http/body.py",  # whole tensors, with orjson, which writes null for numbers that are not finite
    "stages/models/sandbox.py",
    "stages/models/gpu/messages.py",
    "stages/models/runtime/trial_run.py",
    "stages/models/runtime/trial_child.py",  # words between a process and its child
}


def writes_json(path: Path) -> bool:
    """Whether a module writes JSON in the ways of `json` or aiohttp, without `json_text`."""
    for node in nodes_of(path, "json"):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name) and (
                node.func.value.id.removeprefix("or"),
                node.func.attr[:4],
            ) == ("json", "dump"):
                return True
            if node.func.attr == "json_response" and "json_text" not in [ast.unparse(k.value) for k in node.keywords]:
                return True
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            return True
    return False


def test_json_for_people_and_programs_is_written_in_one_place() -> None:
    """`bus.text.json_text`, which never writes NaN or Infinity; messages and state on the bus have codecs of their own."""
    rooms = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("deploy", "loadgen", "stages")]
    assert {str(path.relative_to(ROOT)) for path in rooms if writes_json(path)} == JSON_BETWEEN_OURSELVES


def test_nothing_that_is_printed_turns_into_a_picture() -> None:
    """Rich replaces `:END:` and `:X:` in a user's text by emoji, unless a console is made with `emoji=False`."""
    for path in FILES:
        for node in nodes_of(path, "Console"):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                told = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "emoji"]
                assert told == ["False"], f"{path}:{node.lineno}: Console without emoji=False"


def test_the_cards_packages_are_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = {entry.split(">")[0].split("=")[0].strip() for entry in project["project"]["dependencies"]}
    assert names >= CARD_PACKAGES
    assert "tensorflow" not in names
    assert any(entry.startswith("pytest-asyncio") for entry in project["dependency-groups"]["dev"])


def test_the_top_level_is_the_cards() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    made = {"build", "dist", "demo-out", "figures", "runs"}
    packages = {name for name in folders - made if not name.endswith(".egg-info")} - {"__pycache__"}
    assert packages == {"deepar", "bus", "stages", "planner", "deploy", "loadgen", "tests", "docs"}
    assert (ROOT / "pyproject.toml").is_file()


def test_no_file_has_a_catch_all_name() -> None:
    assert not {path.stem for path in FILES} & {"utils", "helpers", "common", "base", "misc"}


@pytest.mark.parametrize("name", [f"requirements{kind}.lock" for kind in ("", "-otel", "-grpc", "-dev", "-clients")])
def test_the_lock_is_hashed_and_names_no_host(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "://" not in text
    requirements = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert requirements
    assert text.count("--hash=sha256:") >= len(requirements)


def test_the_locks_agree() -> None:
    """What traces and gRPC need comes on top; the tests run on the versions that users get."""

    def pins(name: str) -> set[str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return {line.removesuffix(" \\") for line in lines if line and not line.startswith((" ", "#"))}

    core, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    for extra, package in (("otel", "opentelemetry-sdk"), ("grpc", "grpcio")):
        locked = pins(f"requirements-{extra}.lock")
        assert core < locked
        assert any(pin.startswith(f"{package}==") for pin in locked - core)
        assert locked - core <= dev
