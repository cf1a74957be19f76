"""The file of `deepar up`: the example is complete and parses, and what is wrong with a file is named with its key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import deploy
from bus.errors import ConfigError
from deploy.services.settings import (
    BusOptions,
    CloudOptions,
    DeviceOptions,
    EdgeOptions,
    NodeOptions,
    PlannerOptions,
    ServedModel,
    UpSettings,
    load_settings,
    options_of,
)
from deploy.services.wiring import node_settings
from stages.models.files.choice import ModelChoice

EXAMPLE = Path(deploy.__file__).with_name("example.toml")

SMALL = """
models = ["lenet"]

[[edge]]
name = "e1"

[[device]]
name = "d1"
edges = ["e1"]

[[cloud]]
name = "c1"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "up.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_file_of_the_readme_needs_no_broker_and_serves_clients() -> None:
    settings = load_settings(EXAMPLE.with_name("serve.toml"))
    assert settings.bus.kind == "memory"
    assert [device.serve for device in settings.device] == ["127.0.0.1:8600"]
    assert settings.edge
    assert settings.cloud


def test_the_example_is_what_its_comments_say() -> None:
    settings = load_settings(EXAMPLE)
    assert settings.bus.kind == "kafka"
    assert [node.name for node in (*settings.cloud, *settings.edge, *settings.device)] == [
        "c1", "e1", "e2", "d1", "d2", "d3",
    ]  # fmt: skip
    assert settings.edge[0].link2 == 40_000_000
    assert settings.device[0].edges == ("e1", "e2")


@pytest.mark.parametrize(
    "options",
    [UpSettings, BusOptions, PlannerOptions, CloudOptions, EdgeOptions, DeviceOptions],
    ids=lambda o: o.__name__,
)
def test_the_example_shows_every_key_with_a_comment(options: type[UpSettings]) -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    tables = {"bus", "planner", "device", "edge", "cloud"}
    for key in set(options.model_fields) - tables:
        shown = [line for line in lines if re.match(rf"(# )?{key} = ", line)]
        assert any("#" in line[2:] for line in shown) or (options is not UpSettings and key == "name"), key


def test_what_is_left_out_has_the_default(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, SMALL))
    assert settings.planner == PlannerOptions()
    assert (settings.edge[0].slots, settings.edge[0].link1, settings.device[0].runner) == (2, 10**9, "litert")


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        (("models =", "modles ="), "modles", "unknown key"),
        (('name = "e1"', 'name = "e1"\nslot = 2'), "edge.1.slot", "unknown key"),
        (('name = "e1"', 'name = "e1"\nslots = 0'), "edge.1.slots", "greater than or equal to 1"),
        (('name = "e1"', 'name = "e1"\nlink1 = "fast"'), "edge.1.link1", "'fast': not a rate; write it like 100Mbps"),
        (('name = "e1"', 'name = "e1"\nlink1 = 200'), "edge.1.link1", "200: a rate without a unit; write 200Mbps"),
        (("models =", "lease = 5\nmodels ="), "lease", "5: a duration without a unit; write 5s"),
        (('name = "c1"', 'name = "c1"\nthreads = 0'), "cloud.1.threads", "0: must be auto or a number from 1 to 1024"),
        (('name = "c1"', 'name = "c1"\nthreads = "all"'), "cloud.1.threads", "all: must be auto or a number"),
        (('name = "e1"', 'name = "e 1"'), "edge.1.name", "is not a valid name"),
        (('name = "d1"', 'name = "d1"\nslowdown = 0.5'), "device.1.slowdown", "greater than or equal to 1"),
        (('name = "c1"', 'runner = "litert"'), "cloud.1.name", "required"),
        (('name = "c1"', 'name = "e1"'), None, "e1: duplicate node name"),
        (('edges = ["e1"]', 'edges = ["e2"]'), None, "device d1 names the edge e2"),
        (("models =", 'lease = "soon"\nmodels ='), "lease", "'soon': not a duration; write it like"),
        (("models =", 'execution = "sequential"\nmodels ='), None, "objective pipelined requires execution streaming"),
    ],
)
def test_an_error_names_the_file_the_key_and_the_cause(
    tmp_path: Path, change: tuple[str, str], key: str | None, said: str
) -> None:
    file = written(tmp_path, SMALL.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    prefix = f"{file}: {key}: " if key else f"{file}: "
    assert str(caught.value).startswith(prefix)
    assert said in str(caught.value)


def test_threads_are_a_number_or_chosen(tmp_path: Path) -> None:
    for given, read in (('"auto"', "auto"), ("3", 3)):
        file = written(tmp_path, SMALL.replace('name = "c1"', f'name = "c1"\nthreads = {given}'))
        assert [node.threads for node in (*load_settings(file).cloud, *load_settings(file).edge)] == [read, 1]


def test_broken_toml_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"up\.toml: not TOML: .*line 3"):
        load_settings(written(tmp_path, "region = 0\n[bus]\nkind = kafka\n"))
    file = tmp_path / "up.toml"
    file.write_bytes(b"region = \xff")
    with pytest.raises(ConfigError, match=r"up\.toml: not TOML"):
        load_settings(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_settings(tmp_path / "none.toml")


def test_a_model_may_say_which_signature_and_shapes_are_meant(tmp_path: Path) -> None:
    table = '{model = "m.tflite", signature = "decode", input_shape = {x = "1x128"}}'
    settings = load_settings(written(tmp_path, SMALL.replace('["lenet"]', f'["lenet", {table}]')))
    plain, chosen = settings.models
    assert plain == "lenet"
    assert isinstance(chosen, ServedModel)
    assert (chosen.model, chosen.choice) == ("m.tflite", ModelChoice("decode", {"x": (1, 128)}))
    for wrong, words in (
        ('{model = "m.tflite", input_shape = {x = "1,128"}}', "write NAME=1x1280"),
        ('{model = "m.tflite", signatur = "decode"}', "unknown key"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_settings(written(tmp_path, SMALL.replace('["lenet"]', f"[{wrong}]")))


def test_a_played_network_becomes_what_the_node_announces(tmp_path: Path) -> None:
    trace = tmp_path / "lte.csv"
    trace.write_text("t_s,bps,latency_s\n0,5000000,0.03\n1,0,0.05\n2,0,0.05\n", encoding="utf-8")
    text = SMALL.replace('name = "e1"', 'name = "e1"\nlink2_latency = "40ms"')
    text = text.replace('name = "c1"', f'name = "c1"\nlink2_trace = "{trace}"')
    text = text.replace('name = "d1"', f'name = "d1"\nlink1_latency = "{trace}"')  # a file here is a trace, too
    settings = load_settings(written(tmp_path, text))
    nodes = (*settings.device, *settings.edge, *settings.cloud)
    networks = {node.name: node_settings(node, region=0, lease_s=1.0).network for node in nodes}
    assert {name: network.mean_latency_s for name, network in networks.items()} == pytest.approx(
        {"d1": 0.04, "e1": 0.04, "c1": 0.04}
    )
    assert [networks[name].trace is not None for name in ("d1", "e1", "c1")] == [True, False, True]


@pytest.mark.parametrize(
    ("options", "flags", "said"),
    [
        (DeviceOptions, {"edges": ("a b",)}, "--edge 1: 'a b' is not a valid name"),
        (EdgeOptions, {"link2_latency": "1"}, "--link2-latency: '1': a duration without a unit; write 1s"),
        (DeviceOptions, {"link1_latency": "gone.csv"}, "--link1-trace: trace gone.csv: No such file or directory"),
        (DeviceOptions, {"link1_trace": "gone.csv"}, "--link1-trace: trace gone.csv: No such file or directory"),
    ],
)
def test_a_fault_of_a_flag_names_the_flag_as_it_is_typed(
    options: type[NodeOptions], flags: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        options_of(options, name="n", **flags)
    assert str(caught.value).startswith(said)
