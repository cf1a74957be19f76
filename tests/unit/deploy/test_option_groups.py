"""Option groups: their fields become options of a command, in their place, and the command receives whole groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from deploy.console_output.option_groups import with_option_groups


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group inside a group."""

    depth: Annotated[int, typer.Option(envvar="TEST_DEPTH", help="How deep.")] = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A group with an option, another group, and an option."""

    first: Annotated[str, typer.Option(help="The first.")] = "a"
    inner: Inner = field(default_factory=Inner)
    last: Annotated[list[str] | None, typer.Option(help="The last.")] = None


received: list[tuple[str, Outer, bool]] = []
app = typer.Typer()


@app.command()
@with_option_groups
def serve(name: Annotated[str, typer.Argument()], outer: Outer, loud: bool = False) -> None:
    """Serve something."""
    received.append((name, outer, loud))


def test_a_command_receives_its_groups() -> None:
    found = CliRunner().invoke(app, ["n", "--last", "x", "--last", "y", "--loud"], env={"TEST_DEPTH": "3"})
    assert found.exit_code == 0, found.output
    assert received[-1] == ("n", Outer(inner=Inner(depth=3), last=["x", "y"]), True)
    assert CliRunner().invoke(app, ["n"]).exit_code == 0
    assert received[-1] == ("n", Outer(), False)


def test_options_keep_the_order_of_their_declaration() -> None:
    command = typer.main.get_command(app)
    names = [parameter.name for parameter in command.params]
    assert names[:5] == ["name", "first", "depth", "last", "loud"]
    assert command.help == "Serve something."


def test_two_options_of_one_name_are_an_error() -> None:
    def twice(inner: Inner, depth: int) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name"):
        with_option_groups(twice)
