"""Every command in the docs: it is one that the command line takes, and those of the user's pages are run for real.

Commands that need a broker are run by `test_docs_on_kafka.py`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import typer

from deploy import cli
from tests.documented import PAGES, ROOT, Line, indented_lines_of, inline_lines_of, lines_of
from tests.integration.test_living_path import documented_services

OURS = (
    "README.md",
    "quickstart.md",
    "concepts.md",
    "own-model.md",
    "own-policy.md",
    "limits.md",
    "interface.md",
    "serving.md",
)

ELSEWHERE = {
    "make demo": "tests/integration/test_demo.py plays it",
    "deepar broker": "tests/integration/test_broker.py starts, kills and restarts it",
    "deepar simulate all --out figures": "tests/sim/test_figures.py makes each figure, with fewer seeds",
    **dict.fromkeys(documented_services(), "tests/integration/test_living_path.py starts it so, with LeNet"),
    "deepar tail decisions --json": "tests/integration/test_living_path.py, with --exit",
    "deepar --install-completion": "it writes into the user's shell",
    "deepar loadgen replay --tasks 20 --within 20s": "tests/integration/test_living_path.py, with 20 samples a task",
}
"""Commands of our pages that are run by other tests."""


LINES = [line for page in PAGES for line in lines_of(page)]
INLINE = [line for page in PAGES for line in inline_lines_of(page)]


def command_and_rest(line: Line, command: Any) -> tuple[Any, list[str]]:
    """The command that a line names, and the words behind its name."""
    found, words = command, line.text.split()[1:]
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    return found, words


WHOLE = cli.whole()
WITH_WORDS = [line for line in INLINE if command_and_rest(line, WHOLE)[1]]
OUR_LINES = [line for line in (*LINES, *WITH_WORDS) if line.page in OURS]


@pytest.fixture
def command() -> Any:
    """The whole command line."""
    return WHOLE


SHOWN = [line for line in LINES if "deepar " in line.text] + [
    line for page in PAGES for line in indented_lines_of(page)
]


@pytest.mark.parametrize("line", SHOWN, ids=str)
def test_every_deepar_command_in_the_docs_is_one(
    line: Line, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name, its options and their types; nothing is run."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line.text.split(" | ")[0])
    while words and "=" in words[0]:
        words.pop(0)
    if not words or words[0] != "deepar":
        return
    for place, word in enumerate(words):
        if word.endswith(".tflite"):
            shutil.copy(ROOT / "stages/data/lenet.tflite", tmp_path / "MODEL.tflite")
            words[place] = str(tmp_path / "MODEL.tflite")
        elif word.endswith(".npz"):
            (tmp_path / word).touch()
            words[place] = str(tmp_path / word)
    rest, context, found = words[1:], None, command
    while True:
        try:
            context = found.make_context(found.name or "deepar", rest, parent=context)
        except typer.Exit:
            return  # --help
        except Exception as error:
            tell = getattr(error, "format_message", None)  # a usage error
            if tell is None:
                raise
            pytest.fail(f"{line}: {tell()}", pytrace=False)
        if not hasattr(found, "resolve_command"):
            return
        _, inner, rest = found.resolve_command(context, [*context._protected_args, *context.args])
        assert inner is not None, line
        found = inner


@pytest.mark.parametrize("line", INLINE, ids=str)
def test_every_command_in_a_sentence_is_one(
    line: Line, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentence may speak of a command, of one of its options, or leave words out (`...`, `[--json]`); else it is whole."""
    found, words = command_and_rest(line, command)
    inside = [found, *getattr(found, "commands", {}).values()]
    options = {option for one in inside for parameter in one.params for option in parameter.opts}
    options |= {"--install-completion"} if found is command else set()  # added when the program starts
    left_out = any(word == "..." or word.startswith("[") for word in words)
    placeholder = bool(words) and words[0].isupper() and hasattr(found, "commands")
    if left_out or placeholder or (len(words) == 1 and words[0] in options) or not words:
        assert {word.strip("[]") for word in words if word.lstrip("[").startswith("--")} <= options
        return
    numbered = re.sub(r"\bN\b", "1", line.text)
    test_every_deepar_command_in_the_docs_is_one(Line(line.page, numbered), command, tmp_path, monkeypatch)


def test_a_sentence_with_half_a_command_is_noticed(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (
        "deepar models build --out FILE",
        "deepar nothing",
        "deepar planner --bogus",
        "deepar tail ... --bogus",
    ):
        with pytest.raises((pytest.fail.Exception, Exception), match=r"(?i)no such|missing|bogus"):
            test_every_command_in_a_sentence_is_one(Line("x.md", text), command, tmp_path, monkeypatch)


def test_a_command_that_is_none_is_noticed(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("deepar tail decisions --bogus", "deepar nothing", "deepar loadgen replay --tasks many"):
        with pytest.raises((pytest.fail.Exception, Exception), match=r"(?i)no such|invalid"):
            test_every_deepar_command_in_the_docs_is_one(Line("x.md", text), command, tmp_path, monkeypatch)


class Shell:
    """Runs lines of the docs in a folder, as they stand."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        scripts = sysconfig.get_path("scripts")
        self.environment = os.environ | {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "NO_COLOR": "1",
            "COLUMNS": "160",
            **environment,
        }
        self.ran: set[str] = set()
        (folder / "docs").symlink_to(ROOT / "docs")
        (folder / "deploy").symlink_to(ROOT / "deploy")
        shutil.copy(ROOT / "stages/data/lenet.tflite", folder / "MODEL.tflite")

    def run(self, text: str, timeout_s: float = 240.0) -> str:
        """A command that ends, and ends well: what it printed. It must be in our pages."""
        assert text in {line.text for line in OUR_LINES}, f"no page says: {text}"
        self.ran.add(text)
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


WITHOUT_BROKER = (
    "deepar models cuts MODEL.tflite",
    "deepar models verify MODEL.tflite",
    "deepar models slice MODEL.tflite --out parts",
    "deepar profile MODEL.tflite --out here.json",
    "deepar plan MODEL.tflite --device here.json --edge here.json --cloud here.json --link1 100Mbps --link2 20Mbps",
    "deepar plan alexnet --objective pipelined --samples 200 --policy routes",
    "deepar plan alexnet --objective pipelined --samples 200 --policy routes --codecs",
    (
        "PYTHONPATH=docs/examples deepar simulate sweep --policies deepar,private_first:PrivateFirst"
        " --vary devices=20 --seeds 1 --out sweep"
    ),
    "deepar simulate fig4a --out figures",
)
"""In the order in which they are run."""
SERVED = {
    "PYTHONPATH=docs/examples deepar planner --policy private_first:PrivateFirst",
    "deepar stage cloud --model MODEL.tflite",
    "deepar stage edge --name e1 --model MODEL.tflite",
    "deepar stage device --name d1 --model MODEL.tflite",
    "deepar up deploy/example.toml",
    "deepar ui",
    "deepar stage device --name d4 --serve 127.0.0.1:8600",
    "deepar gateway --serve 127.0.0.1:8602",
}
WITH_BROKER = {
    "deepar loadgen replay --models alexnet --devices d2,d3 --tasks 2 --within 2s",
    "deepar loadgen replay --models MODEL --tasks 5",
    "deepar loadgen replay --tasks 20 --within 10s",
    "deepar top",
    "deepar top --once",
    "deepar top --replay --speed 5",
    "deepar top --json",
    "deepar tail decisions --exit",
    "python docs/examples/watch.py localhost:9092",
}


SERVING = "deepar up deploy/serve.toml"
AT_THE_ENDPOINT = {line.text for line in OUR_LINES if "curl" in line.text or "digit.npy" in line.text} | {
    "deepar infer lenet --input photo.png --json"
}
"""`test_docs_serving.py` runs all of them."""


def test_every_command_of_our_pages_is_run_somewhere() -> None:
    run = {*WITHOUT_BROKER} | SERVED | WITH_BROKER | ELSEWHERE.keys() | {SERVING} | AT_THE_ENDPOINT
    assert {line.text for line in OUR_LINES} == run


def test_the_policy_in_the_page_is_the_file_that_is_run() -> None:
    page = (ROOT / "docs/own-policy.md").read_text(encoding="utf-8")
    shown = page.split("```python\n")[1].split("```")[0].strip()
    assert (ROOT / "docs/examples/private_first.py").read_text(encoding="utf-8").strip().endswith(shown)
    assert len(shown.splitlines()) <= 40


def test_every_picture_and_page_that_is_linked_is_there() -> None:
    for page in (page for page in PAGES if page.name in OURS):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_security_page_makes_a_certificate_that_its_authority_vouches_for(tmp_path: Path) -> None:
    lines = [line.text for line in LINES if line.page == "security.md" and not line.text.startswith("deepar")]
    assert any(text.startswith("openssl x509") for text in lines)
    for text in lines[: 1 + next(n for n, text in enumerate(lines) if "> broker.pem" in text)]:
        subprocess.run(["bash", "-c", text], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    verify = ["openssl", "verify", "-CAfile", "ca.pem", "-verify_hostname", "broker.example", "broker.pem"]
    subprocess.run(verify, cwd=tmp_path, check=True, capture_output=True, timeout=60)


def pasted(word: str) -> str:
    """The output with `word` in it that the README shows."""
    blocks = re.findall(
        r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (found,) = [block for block in blocks if word in block]
    return str(found)


def lines_without_margins(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_commands_that_need_no_broker(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    for text in WITHOUT_BROKER:
        printed = shell.run(text)
        for word, of in (("bit-identical", "verify"), ("PrivateFirst", "sweep"), ("fig4a", "fig4a")):
            if of in text:
                shown = lines_without_margins(pasted(word))
                assert lines_without_margins(printed)[: len(shown)] == shown
        if "sweep" in text:
            assert (tmp_path / "sweep" / "sweep.csv").read_text().count("private_first:PrivateFirst") == 1
        if "verify" in text:
            assert "identical" in printed


def test_the_example_uses_nothing_of_ours() -> None:
    imports = re.findall(r"^(?:from|import) (\w+)", (ROOT / "docs/examples/watch.py").read_text(), re.MULTILINE)
    assert set(imports) - set(sys.stdlib_module_names) == {"msgpack", "aiokafka"}
