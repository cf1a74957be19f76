"""A region on Kafka whose device serves clients, for the tests: planner, cloud, edge and device as processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from bus.tensors import Array
from deploy.kafka_local.ports import free_port
from stages.models.model import Model
from tests.clients.cases import Case
from tests.integration.deepar_processes import Process, Processes
from tests.kafka_broker import OwnBroker, choose, start_broker

COMMANDS = {
    "planner": ("planner",),
    "cloud": ("stage", "cloud"),
    "edge": ("stage", "edge", "--name", "e1"),
    "device": ("stage", "device", "--name", "d1"),
}


@dataclass
class System:
    """A running region."""

    broker: OwnBroker
    processes: Processes
    running: dict[str, Process]
    http: str  # HOST:PORT of the endpoint
    grpc: str
    models: Sequence[str]

    def start(self, name: str) -> Process:
        """Start a process of the region, for the first time or again."""
        arguments = COMMANDS[name]
        if name == "device":
            arguments += ("--serve", self.http, "--serve-grpc", self.grpc)
        if name != "planner":
            arguments += tuple(word for model in self.models for word in ("--model", model))
        self.running[name] = self.processes.start(name, *arguments, environment={"DEEPAR_HTTP_HOST": "127.0.0.1"})
        return self.running[name]


@contextlib.contextmanager
def serving_system(
    folder: Path, models: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[System]:
    """A region with these models, all of it ready."""
    broker = start_broker(choose(), folder / "kafka")
    try:
        with Processes(broker.bootstrap, folder) as processes:
            processes.environment |= environment or {}
            http, grpc = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
            system = System(broker, processes, {}, http, grpc, models)
            for name in COMMANDS:
                system.start(name)
            for process in system.running.values():
                process.wait_ready()
            yield system
    finally:
        broker.stop()


def uncut(model: Model, inputs: Mapping[str, Array]) -> Case:
    """The outputs of a model that is not cut, for a batch: each sample alone, since the model's batch has one."""
    interpreter = Interpreter(str(model.path), num_threads=1)
    interpreter.allocate_tensors()
    given, told = _named(interpreter, "input"), _named(interpreter, "output")
    samples = []
    for at in range(len(next(iter(inputs.values())))):
        for name, array in inputs.items():
            interpreter.set_tensor(given[name]["index"], array[at : at + 1])
        interpreter.invoke()
        samples.append({name: np.copy(interpreter.get_tensor(one["index"])) for name, one in told.items()})
    return Case(model.name, inputs, {name: np.concatenate([one[name] for one in samples]) for name in samples[0]})


def _named(interpreter: Interpreter, kind: str) -> dict[str, Any]:
    """The inputs or outputs under the names of the signature; without a signature under those of the tensors."""
    details = {"input": interpreter.get_input_details, "output": interpreter.get_output_details}[kind]()
    signatures = interpreter.get_signature_list()
    if not signatures:
        return {one["name"]: one for one in details}
    runner = interpreter.get_signature_runner()
    named = runner.get_input_details() if kind == "input" else runner.get_output_details()
    return dict(named)


def random_inputs(model: Model, samples: int, seed: int) -> dict[str, Array]:
    """A batch of random inputs under the names that the endpoint gives them."""
    numbers = np.random.default_rng(seed)
    details = _named(Interpreter(str(model.path), num_threads=1), "input")
    return {
        name: numbers.normal(size=(samples, *detail["shape"][1:])).astype(detail["dtype"])
        for name, detail in details.items()
    }
