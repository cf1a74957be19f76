"""Serving as README and docs/serving.md show it: an endpoint without a broker, every command and program that asks it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.kafka_local.ports import free_port
from stages.models.runtime.litert import SegmentRunner
from stages.zoo.registry import digits, load_model
from tests.documented import README, ROOT
from tests.integration.deepar_processes import Process, Processes
from tests.integration.test_docs import AT_THE_ENDPOINT, SERVING, Shell, lines_without_margins, pasted

SHOWN = "127.0.0.1:8600"
PAGE = ROOT / "docs/serving.md"


class Endpoint:
    """The endpoint of the pages on a port of its own, and a shell whose commands ask there."""

    def __init__(self, folder: Path, address: str) -> None:
        self.shell = Shell(folder, DEEPAR_URL=f"http://{address}", PYTHONPATH=str(ROOT))
        self.address = address

    def run(self, text: str) -> str:
        """What a command of the pages prints."""
        assert text in AT_THE_ENDPOINT
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", text.replace(SHOWN, self.address)],
            cwd=self.shell.folder,
            env=self.shell.environment,
            capture_output=True,
            text=True,
            timeout=120.0,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def program(self, page: Path) -> str:
        """What the Python program of a page prints."""
        (text,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        done = subprocess.run(
            [sys.executable, "-c", text.replace(SHOWN, self.address)],
            cwd=self.shell.folder,
            env=self.shell.environment,
            capture_output=True,
            text=True,
            timeout=120.0,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def wait_ready(process: Process, address: str) -> None:
    until_s = time.monotonic() + 120.0
    while time.monotonic() < until_s:
        assert process.process.poll() is None, process.text()
        try:
            with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5.0):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(process.text())


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """`deepar up deploy/serve.toml`, with LeNet's digit and a photo in the folder of the shell."""
    folder = tmp_path_factory.mktemp("serving")
    address = f"127.0.0.1:{free_port()}"
    found = Endpoint(folder, address)
    (folder / "deploy").unlink()
    (folder / "deploy").mkdir()
    text = (ROOT / "deploy/serve.toml").read_text(encoding="utf-8")
    assert SHOWN in text
    (folder / "deploy/serve.toml").write_text(text.replace(SHOWN, address), encoding="utf-8")
    from PIL import Image

    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save(folder / "photo.png")
    with Processes("127.0.0.1:1", folder) as processes:  # there is no broker
        wait_ready(processes.start("up", *SERVING.split()[1:]), address)
        found.run(next(text for text in AT_THE_ENDPOINT if "numpy.save" in text))
        yield found


def whole_answer() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The output of the uncut LeNet for the README's digit."""
    (logits,) = SegmentRunner(load_model("lenet").source).run([digits()[0][:1]])
    return np.asarray(logits)


def without_times(line: str) -> str:
    return re.sub(r"[\d.]+ (s|ms|us)\b", "TIME", line)


def test_the_readme_prints_what_it_shows(endpoint: Endpoint) -> None:
    printed = lines_without_margins(endpoint.run("deepar infer lenet --input digit.npy"))
    shown = lines_without_margins(pasted("logits"))
    assert printed[:-1] == shown[:-1]
    assert without_times(printed[-1]) == without_times(shown[-1])


def test_curl_gets_the_answer_of_the_uncut_model(endpoint: Endpoint) -> None:
    (text,) = [text for text in AT_THE_ENDPOINT if text.endswith("/infer")]
    (output,) = json.loads(endpoint.run(text))["outputs"]
    assert np.array(output["data"], np.float32).tobytes() == whole_answer().tobytes()


def test_the_program_of_the_readme_gets_the_same(endpoint: Endpoint) -> None:
    assert endpoint.program(README) == f"{whole_answer()}\n"


def test_the_program_of_the_page_infers_and_streams(endpoint: Endpoint) -> None:
    lines = endpoint.program(PAGE).splitlines()
    assert lines[0].startswith("['lenet'] (TensorInfo(name='input', dtype='float32', shape=(-1, 28, 28, 1)),)")
    assert lines[1].startswith("(3, 10) device")
    assert sorted(int(line.split()[0]) for line in lines[2:]) == list(range(10))


def test_the_other_commands_of_the_page(endpoint: Endpoint) -> None:
    photo = json.loads(endpoint.run("deepar infer lenet --input photo.png --json"))
    assert photo["outputs"][0]["shape"] == [1, 10]
    far = endpoint.run("deepar infer lenet --input digit.npy --placement edge+cloud --output out.npz")
    assert re.search(r"computed on (edge|cloud|edge\+cloud) through e1", far)
    with np.load(io.BytesIO((endpoint.shell.folder / "out.npz").read_bytes())) as kept:
        assert kept["logits"].tobytes() == whole_answer().tobytes()
    for text in sorted(AT_THE_ENDPOINT):
        if text.startswith("curl"):
            answer = json.loads(endpoint.run(text))
            assert "error" not in answer
