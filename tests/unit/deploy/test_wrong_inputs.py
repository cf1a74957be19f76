"""Mistakes on the command line: each is answered by a line that says what is wrong and where, without a traceback."""

from __future__ import annotations

import asyncio
import shlex
import socket
from pathlib import Path

import pytest

from bus.errors import ConfigError
from deploy.services.telemetry.probes import Health, serve_probes
from tests.unit.deploy.test_cli import run

BYTES = bytes(range(128, 256))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with invalid files of every kind, and the address of a broker that does not run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    (tmp_path / "folder").mkdir()
    for suffix in ("toml", "json", "jsonl", "tflite", "npz"):
        (tmp_path / f"empty.{suffix}").touch()
        (tmp_path / f"bytes.{suffix}").write_bytes(BYTES)
        (tmp_path / f"list.{suffix}").write_text("[1, 2", encoding="utf-8")
    kafka = '[bus]\nkind = "kafka"\n'
    texts = {
        "huge": "devices = 1e400",
        "nan": "devices = nan",
        "many": "devices = 99999999999",
        "backwards": "samples = [5, 1]",
        "fast": 'objective = "fast"',
        "policy": 'policy = "edge-onyl"',
        "model": 'models = ["lenett"]',
        "twice": kafka + '[[edge]]\nname = "e1"\n[[edge]]\nname = "e1"',
        "negative": kafka + '[[edge]]\nname = "e1"\nlink1 = "-5Mbps"',
        "unit": kafka + '[[edge]]\nname = "e1"\nlink1 = 5',
        "trace": 'tasks = 1\nlink1_trace = "lte.csv"',
        "type": 'models = "lenet"',
        "table": "bus = 3",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    (tmp_path / "when.jsonl").write_text('{"at_s": "x", "model": "lenet"}', encoding="utf-8")
    (tmp_path / "blank.jsonl").write_text('{"at_s": 1, "model": "le net"}', encoding="utf-8")
    (tmp_path / "late.csv").write_text("t_s,bps\n0,1\n3,1\n1,1\n", encoding="utf-8")
    (tmp_path / "lte.csv").write_text("t_s,bps,latency_s\n0,1,0.02\n3,1,0.02\n", encoding="utf-8")
    (tmp_path / "nan.txt").write_text("nan", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("up folder", "folder: Is a directory"),
        ("up bytes.toml", "bytes.toml: not TOML"),
        ("up twice.toml", "e1: duplicate node name"),
        ("up negative.toml", "edge.1.link1: '-5Mbps': not a rate"),
        ("up unit.toml", "edge.1.link1: 5: a rate without a unit; write 5Mbps"),
        ("up type.toml", "type.toml: models"),
        ("up table.toml", "table.toml: bus"),
        ("simulate sweep --scenario folder", "folder: Is a directory"),
        ("simulate sweep --scenario huge.toml", "huge.toml: devices: inf is not a whole number"),
        ("simulate sweep --scenario nan.toml", "nan.toml: devices: nan is not a whole number"),
        ("simulate sweep --scenario many.toml", "many.toml: devices: 99999999999 is not a whole number below"),
        ("simulate sweep --scenario backwards.toml", "backwards.toml: samples: 5..1"),
        ("simulate sweep --scenario fast.toml", "fast.toml: objective"),
        (
            "simulate sweep --scenario policy.toml",
            "policy.toml: policy: there is no policy 'edge-onyl'; did you mean edge-only?",
        ),
        ("simulate sweep --scenario model.toml", "'lenett'; did you mean lenet?"),
        ("simulate sweep --vary devices=1:inf", "finite numbers"),
        ("simulate sweep --vary devices=1:1e12", "more than 1,000,000 values"),
        ("simulate sweep --vary devices=nan:5", "a range is START:END:STEP"),
        ("simulate sweep --vary edgse=3", "did you mean edges?"),
        ("simulate sweep --policies my.module:Mine", "put its folder on PYTHONPATH"),
        ("simulate fig4a --policies deeper", "did you mean deepar?"),
        ("simulate fig4a --profile folder", "folder is a folder"),
        ("simulate fig4a --profile list.json", "list.json is broken"),
        ("simulate fig4b --profile papr", "did you mean paper?"),
        ("simulate fig9", "fig9"),
        ("plan lenet --link1 100", "--link1 100: a rate without a unit"),
        ("plan lenet --max-bytes 300", "--max-bytes 300: a size without a unit"),
        ("plan lenet --max-delay 2", "--max-delay 2: a duration without a unit"),
        ("plan lenet --device bytes.json", "bytes.json cannot be read"),
        ("models show folder", "folder: is not a regular file"),
        ("models show empty.tflite", "empty.tflite: has 0 bytes"),
        ("models show lenett", "did you mean lenet?"),
        ("models verify lenet --inputs bytes.npz", "bytes.npz cannot be read"),
        ("broker --data empty.toml", "is a file"),
        ("planner --lease 0", "--lease 0: a lease must be longer than 0"),
        ("planner --lease 5", "--lease 5: a duration without a unit"),
        ("planner --name 'a b'", "--name 'a b' is not a valid name"),
        ("planner --policy edgeonly", "did you mean edge-only?"),
        ("planner --region -1", "--region"),
        (
            "stage edge --link1 30 --runner modelled --profile paper",
            "--link1: '30': a rate without a unit; write 30Mbps",
        ),
        ("stage edge --link2 9000000Gbps", "more than any rate can be"),
        ("stage device --link1-latency 20", "--link1-latency: '20': a duration without a unit; write 20s"),
        ("stage cloud --link2-latency 2h", "--link2-latency: Input should be less than or equal to 3600"),
        ("stage device --link1-trace folder", "--link1-trace: trace folder: Is a directory"),
        ("stage edge --link2-trace late.csv", "--link2-trace: trace late.csv, line 4: t_s: 1 does not come after 3"),
        ("stage device --link1-trace lte.csv --link1-latency 20ms", "trace lte.csv has latencies, too"),
        ("stage device --link1-latency late.csv", "--link1-trace: trace late.csv, line 4"),
        ("stage edge --link2-latency lte.csv --link2-trace lte.csv", "link2_latency and link2_trace both name a trace"),
        ("simulate compare --link2-latency late.csv", "link2_trace: trace late.csv, line 4"),
        ("simulate compare --link1-latency lte.csv --link1-trace lte.csv", "both name a trace"),
        ("simulate compare --link1-latency 20", "--link1-latency 20: a duration without a unit"),
        ("simulate compare --link2-trace late.csv", "link2_trace: trace late.csv, line 4"),
        ("simulate sweep --scenario trace.toml --out out", "no prediction knows a trace"),
        ("stage device --edge 'a b'", "--edge 1: 'a b' is not a valid name"),
        ("stage device --lease 0 --runner modelled --profile paper", "--lease 0: a lease must be longer than 0"),
        ("stage device --identity-key folder --runner modelled --profile paper", "folder: Is a directory"),
        ("loadgen replay --devices 'a b'", "--devices 'a b' is not a valid name"),
        ("loadgen replay --devices ,", "--devices String should have at least 1 character"),
        ("loadgen replay --models ''", "model: "),
        ("loadgen replay --models 'le net'", "model: contains a character"),
        ("loadgen replay --samples 1e30", "samples: 1e+30..1e+30 must be an ascending range"),
        ("loadgen replay --samples nan", "samples: nan..nan"),
        ("loadgen replay --deadline 0", "deadline"),
        ("loadgen replay --schedule folder", "Is a directory"),
        ("loadgen replay --schedule bytes.jsonl", "bytes.jsonl: cannot be read"),
        ("loadgen replay --schedule when.jsonl", "when.jsonl:1: at_s is 'x'"),
        ("loadgen replay --schedule blank.jsonl", "blank.jsonl:1: model: contains a character"),
        ("loadgen replay --request-intervals nan.txt", "request interval 0 is nan"),
        ("loadgen replay -b nonsense", "'nonsense' is not host:port"),
        ("loadgen bench simulatr", "did you mean simulator?"),
        ("loadgen bench simulator --tasks 1", "--tasks 1: must be at least 2, one per region"),
        ("loadgen chaos --stop-for 3", "--stop-for 3: a duration without a unit"),
        ("cancel t1 --timeout 5", "--timeout 5: a duration without a unit"),
        ("explain t1 --from folder", "--from folder: Is a directory"),
        ("explain t1 --from bytes.json", "--from bytes.json: not a text file"),
    ],
)
def test_a_mistake_is_answered_by_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, typed: str, said: str
) -> None:
    assert run(monkeypatch, *shlex.split(typed)) in (1, 2)
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.splitlines()) <= 6


@pytest.mark.parametrize(
    ("variable", "value", "typed"),
    [
        ("DEEPAR_LEASE", "5", "planner"),
        ("DEEPAR_LINK1", "100", "stage edge --runner modelled --profile paper"),
        ("DEEPAR_BROKER_PATIENCE", "60", "planner"),
        ("DEEPAR_SLOTS", "two", "stage edge"),
        ("DEEPAR_HTTP_PORT", "http", "planner"),
        ("DEEPAR_REGION", "-3", "planner"),
        ("DEEPAR_LOG_LEVEL", "chatty", "topics list"),
        ("DEEPAR_POLICY", "deeper", "planner"),
        ("DEEPAR_NODE", "a.b", "stage cloud --runner modelled --profile paper"),
        ("KAFKA_BOOTSTRAP_SERVERS", "here", "planner"),
    ],
)
def test_a_variable_that_is_wrong_is_answered_by_a_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    variable: str,
    value: str,
    typed: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert run(monkeypatch, *shlex.split(typed)) in (1, 2)
    shown = capsys.readouterr().err
    assert value in shown or variable in shown


def test_a_port_that_is_taken_is_named() -> None:
    async def serve(port: int) -> None:
        async with serve_probes(lambda: Health(ready=True, detail={}, gauges={}, counters={}), port=port, labels={}):
            pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--http-port {port}: cannot listen on 127.0.0.1:{port}: Address already"
        ):
            asyncio.run(serve(port))
