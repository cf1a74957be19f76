"""Option groups: frozen dataclasses whose fields are options of a command line command.

A field is declared like a parameter of the command, `name: Annotated[TYPE, typer.Option(...)] = DEFAULT`. Several commands
can share one group, and a group can contain others:

    @dataclass(frozen=True, kw_only=True)
    class ProbeOptions:
        http_port: Annotated[int | None, typer.Option(help="...")] = None

    @app.command()
    @with_option_groups
    def serve(name: Name, probes: ProbeOptions) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import wraps
from typing import Any

Parameters = Iterable[inspect.Parameter]


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter that is annotated with a group by the fields of the group, in its place.

    typer reads the options of a command from its signature, so the result carries the expanded one. The command itself
    receives one value per group.
    """
    own = _parameters(command)

    @wraps(command)
    def run(**given: Any) -> None:
        command(**_grouped(own, given))

    expanded = list(_expanded(own))
    run.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in expanded}
    return run


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function, eval_str=True).parameters.values())


def _fields(parameter: inspect.Parameter) -> list[inspect.Parameter] | None:
    """The fields of a group; None for an option."""
    return _parameters(parameter.annotation) if is_dataclass(parameter.annotation) else None


def _expanded(parameters: Parameters) -> Iterator[inspect.Parameter]:
    for parameter in parameters:
        if (fields := _fields(parameter)) is not None:
            yield from _expanded(fields)
        else:
            yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _grouped(parameters: Parameters, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for these parameters: an option's value, or a group that is built from the values of its fields."""
    found: dict[str, Any] = {}
    for parameter in parameters:
        fields = _fields(parameter)
        group = parameter.annotation
        found[parameter.name] = given[parameter.name] if fields is None else group(**_grouped(fields, given))
    return found
