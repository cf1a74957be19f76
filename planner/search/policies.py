"""The placement policies: those of the paper, and the loader for a user's own.

A policy is an object with a `name` and a method `place`. The planner passes it Algorithm 1 for one task and the current
ledger (`Algorithm`). The policy returns one `Choice`, or None if the task must wait for nodes to join. The paper's policies
restrict Algorithm 1; a user's policy can do the same:

>>> class Thrifty:
...     '''Never uses the cloud.'''
...
...     name = "thrifty"
...
...     def place(self, algorithm):
...         return algorithm.best({DEVICE, DEVICE_EDGE})

It is named by an entry point of the group `deepar.policies`, or as `module:name`; a class is instantiated without
arguments. A policy must depend only on its argument: no clock, no randomness, no state of its own. Otherwise `explain` could
not reproduce its decisions.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import PurePath
from types import ModuleType
from typing import Final, Protocol, runtime_checkable

from bus.errors import ConfigError, PolicyError, UnknownNameError, unknown_name
from bus.values import Objective
from planner.search.algorithm1 import Algorithm
from planner.search.families import DEVICE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.placements import Choice
from planner.search.request import EVERY_FAMILY

ENTRY_POINT_GROUP: Final = "deepar.policies"
MAX_FAULT: Final = 1_000
"""Limit of characters in the description of a policy's error."""


EXACT_BELOW: Final = 50
"""Tasks with fewer samples are predicted sample by sample if they take several routes: the formula is for many."""

DEVICE_WORTH: Final = 0.15
"""Least share of its time that a task of several routes must save by computing on its device, if the device has other tasks.

Several routes make nearly every task compute on its device, which computes one task at a time. So without this price the
tasks of a busy device wait for small gains of others. It was found by simulation: see docs/planner.md.
"""
WORTH_STARTING: Final = 3.0
"""An elastic policy starts a task at once, instead of later on more, if it then ends at most this many times later: it is
likely to be rerouted before.
"""


@runtime_checkable
class Policy(Protocol):
    """The interface of a policy; the planner calls `place` for every task."""

    @property
    def name(self) -> str:
        """The name of the policy in messages."""

    def place(self, algorithm: Algorithm) -> Choice | None:
        """The placement and start of the task, or None if no present node can serve it."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """A policy that runs Algorithm 1 over some of its candidates."""

    name: str
    families: frozenset[int] = EVERY_FAMILY
    device_computes: bool = True  # False: cut1 = 0
    delayed: bool = True  # False: start now, or run locally
    mixes: bool = False  # the samples of a task may take several routes
    elastic: bool = (
        False  # start soon, and reroute running tasks when something becomes free (`planner.core.rerouting`)
    )

    def place(self, algorithm: Algorithm) -> Choice | None:
        """The best of the allowed candidates."""
        soon = self.at_once(algorithm) if self.elastic else None
        if soon is None:
            return self.best(algorithm, self.families)
        end_s = min(algorithm.deadline_s, algorithm.now + soon.delay_s / WORTH_STARTING)
        return self.best(Algorithm(algorithm.request, algorithm.now, end_s), self.families) or soon

    def at_once(self, algorithm: Algorithm) -> Choice | None:
        """The best of the allowed candidates that start now."""
        choice = replace(self, delayed=False).best(algorithm, self.families)
        return None if choice is None or choice.start_s > algorithm.now else choice

    def best(self, algorithm: Algorithm, families: Collection[int]) -> Choice | None:
        """The best of the allowed candidates of some families."""
        if not self.mixes:
            return algorithm.best(families, device_computes=self.device_computes, delayed=self.delayed)
        best = self._mixed(algorithm, families, device_computes=self.device_computes)
        if best is None or not best.uses_device or not algorithm.request.others:
            return best
        other = self._mixed(algorithm, families, device_computes=False)
        if other is None or algorithm.value_s(best) <= (1.0 - DEVICE_WORTH) * algorithm.value_s(other):
            return best
        return other

    def _mixed(self, algorithm: Algorithm, families: Collection[int], *, device_computes: bool) -> Choice | None:
        """The best choice of one or several routes."""
        mixes = algorithm.with_routes()
        best = mixes.best(families, device_computes=device_computes, delayed=self.delayed)
        if best is None or not best.routes or algorithm.request.samples >= EXACT_BELOW:
            return best
        single = algorithm.best(families, device_computes=device_computes, delayed=self.delayed)
        found = [choice for choice in (single, mixes.exact(best)) if choice is not None]
        return min(found, key=algorithm.value_s, default=None)


BUILT_IN: Final[dict[str, Policy]] = {
    policy.name: policy
    for policy in (
        Restriction("deepar"),
        Restriction("no-delay", delayed=False),
        Restriction("device-only", frozenset({DEVICE})),
        Restriction("edge-only", frozenset({DEVICE_EDGE}), device_computes=False),
        Restriction("cloud-only", frozenset({DEVICE_CLOUD}), device_computes=False),
        # one cut at any position; a cut after the last layer runs the whole model on the device, as in the original
        Restriction("neurosurgeon", frozenset({DEVICE, DEVICE_CLOUD})),
        Restriction("routes", mixes=True),
        Restriction("elastic", mixes=True, elastic=True),
    )
}


def load_policy(name: str) -> Policy:
    """The policy with this name: a built-in one, an entry point, or `module:name`.

    Raises `UnknownNameError` for an unknown name, and `ConfigError` for an object that is not a policy.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        return _checked(name, _imported(name, module_name, attribute))
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in plugins:
        return _checked(name, plugins[name].load())
    known = policy_names()
    raise unknown_name("policy", name, known)


def mixes(policy: Policy) -> bool:
    """Whether a policy may give the samples of a task several routes."""
    return isinstance(policy, Restriction) and policy.mixes


def check_objective(policy: Policy, objective: Objective) -> None:
    """Raise `ConfigError` if a policy cannot minimise an objective."""
    if mixes(policy) and objective is not Objective.PIPELINED:
        raise ConfigError(
            f"policy {policy.name} gives the samples of a task several routes at once, which needs objective "
            f"{Objective.PIPELINED}, not {objective}",
            remedy=f"--objective {Objective.PIPELINED}",
        )


def policy_module(name: str) -> str | None:
    """The module that defines a policy; None for a built-in policy or an unknown name."""
    if name in BUILT_IN:
        return None
    if ":" in name:
        return name.partition(":")[0]
    return next((point.module for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name), None)


def _imported(name: str, module_name: str, attribute: str) -> object:
    """The object that `module:name` names. Importing runs the user's code; its errors are reported with file and line."""
    if not module_name or not attribute:
        raise ConfigError(f"policy {name}: write a policy of your own as module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"policy {name}: {module_name} imports {error.name}, which is not installed") from error
        raise UnknownNameError(
            f"policy {name}: Python finds no module {error.name}",
            remedy="put its folder on PYTHONPATH, as in: PYTHONPATH=. deepar ...; or install it into this environment",
        ) from error
    except Exception as error:
        raise ConfigError(f"policy {name} cannot be imported: {_place(error)}") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise unknown_name(f"policy in {module_name} called", attribute, _policies_of(module))
    return found


def _policies_of(module: ModuleType) -> list[str]:
    """The public names in a module whose values have a `place` method."""
    return [name for name, value in vars(module).items() if callable(getattr(value, "place", None)) and name[0] != "_"]


def _place(error: Exception) -> str:
    """An error of the user's code, with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def policy_names() -> list[str]:
    """The names of all policies that can be given without a module: built-in ones and entry points."""
    return [*BUILT_IN, *sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)} - set(BUILT_IN))]


def _checked(name: str, found: object) -> Policy:
    try:
        policy = found() if isinstance(found, type) else found
    except Exception as error:
        raise ConfigError(f"policy {name} cannot be made: {_place(error)}") from error
    if not isinstance(policy, Policy) or not isinstance(policy.name, str):
        raise ConfigError(f"policy {name}: {found!r} has no `name` and `place`")
    return policy


def policy_fault(policy: Policy, error: BaseException) -> str:
    """An error of a user's policy in words: the policy, the file and line, and the error.

    The line is the one that raised the error in the policy's file, or else the line of `place`.
    """
    place = getattr(type(policy).place, "__code__", None)
    where = "" if place is None else f" ({_named(place.co_filename)}:{place.co_firstlineno})"
    for frame, line in traceback.walk_tb(error.__traceback__):
        if place is not None and frame.f_code.co_filename == place.co_filename:
            where = f" ({_named(place.co_filename)}:{line})"
    what = str(error) if isinstance(error, PolicyError) else f"{type(error).__name__}: {error}"
    return f"policy {policy.name}{where}: {what}"[:MAX_FAULT]


def _named(path: str) -> str:
    return PurePath(path).name
