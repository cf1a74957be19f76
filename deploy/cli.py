"""The command line `deepar`: the table of commands, and the conversion of errors to messages and exit codes.

A command's module is imported only when that command runs, so that `deepar --help` is fast.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from bus.errors import ConfigError, DeeparError
from deploy.interrupts import end_children, raise_interrupts
from deploy.services.process import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE

TYPERS_INTERRUPTED = 130
"""Exit code that typer returns for a KeyboardInterrupt which it caught itself."""

RUN, SEE, MODELS = "Run", "See", "Models, plans and experiments"


@dataclass(frozen=True, slots=True)
class _Command:
    """One row of the command table. The module is imported when the command runs or is completed by the shell."""

    name: str
    panel: str
    module: str
    attribute: str
    summary: str  # its line in `deepar --help`


COMMANDS = (
    _Command("demo", RUN, "deploy.commands.demo", "demo", "Watch a device, an edge and a cloud at work, without a broker."),
    _Command("broker", RUN, "deploy.commands.kafka.broker", "broker", "Start an Apache Kafka broker on this machine."),
    _Command("up", RUN, "deploy.commands.services.up", "up", "Start a planner and stages from a TOML file, in one process."),
    _Command("planner", RUN, "deploy.commands.services.planner", "planner", "Run the planner: it decides where tasks run."),
    _Command("stage", RUN, "deploy.commands.services.stage", "stage_app", "Run a stage: device, edge or cloud worker."),
    _Command("gateway", RUN, "deploy.commands.services.stage", "gateway", "Serve clients that have no device of their own."),
    _Command("topics", RUN, "deploy.commands.kafka.topics", "topics_app", "Create or list the topics on Kafka."),
    _Command("acls", RUN, "deploy.commands.kafka.acls", "acls", "Show or set the access control lists of the topics."),
    _Command("identity", RUN, "deploy.commands.identity", "app", "Create the secrets that prove a node's identity."),
    _Command("infer", RUN, "deploy.commands.infer", "infer", "Compute a model on your own input, and see the answer."),
    _Command("loadgen", RUN, "deploy.commands.loadgen.replay", "app", "Submit tasks, measure this machine, break processes."),
    _Command("cancel", RUN, "deploy.commands.cancel", "cancel", "Cancel tasks before they are done."),
    _Command("tail", SEE, "deploy.commands.kafka.tail", "tail_app", "Follow a topic, one line per message."),
    _Command("top", SEE, "deploy.commands.top", "top", "Watch nodes and tasks in the terminal."),
    _Command("ui", SEE, "deploy.commands.ui", "ui", "Watch nodes and tasks in the browser."),
    _Command("dead-letter", SEE, "deploy.commands.kafka.dead_letter", "app", "List and show messages that were rejected."),
    _Command("explain", SEE, "deploy.commands.explain", "explain", "Show why a task ran where it ran, and what it took."),
    _Command("doctor", SEE, "deploy.commands.doctor", "doctor", "Check this machine, the broker and the region."),
    _Command("healthcheck", SEE, "deploy.commands.healthcheck", "healthcheck", "Query a service's readiness probe."),
    _Command("models", MODELS, "deploy.commands.models", "app", "List, show, cut and verify models."),
    _Command("profile", MODELS, "deploy.commands.models", "profile", "Measure each layer of a model on this machine."),
    _Command("plan", MODELS, "deploy.commands.plan", "plan", "Find where a model is best cut, for given speeds and links."),
    _Command("simulate", MODELS, "deploy.commands.simulate.figures", "app", "Run the paper's experiments, and sweeps."),
)  # fmt: skip


class CommandTable(TyperGroup):
    """A typer group that lists commands from `COMMANDS` and imports only the command that is run or completed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {
            one.name: TyperCommand(one.name, help=one.summary, rich_help_panel=one.panel) for one in COMMANDS
        }
        _shorten(self)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        for one in COMMANDS:
            if args and one.name == args[0]:
                self.commands[one.name] = _imported(one)
        return super().resolve_command(ctx, args)


def _imported(command: _Command) -> Any:
    """Import a command and build its typer object."""
    found = getattr(importlib.import_module(command.module), command.attribute)
    alone = typer.Typer(rich_markup_mode="markdown")
    if isinstance(found, typer.Typer):
        alone.add_typer(found, name=command.name)
    else:
        alone.command(command.name)(found)
    made = typer.main.get_group(alone).commands[command.name]
    _shorten(made)
    if HELP & {*sys.argv}:
        # The range in `N [1<=x<=65535]` takes half a line; the error for a number outside the range states it.
        vars(importlib.import_module("typer.rich_utils"))["RANGE_STRING"] = ""
    return made


SHORT = {
    **dict.fromkeys(("<str>", "<list[str]>"), "TEXT"),
    **dict.fromkeys(("<path>", "<file>", "<dir>"), "PATH"),
    **dict.fromkeys(("<int>", "<int range>", "<float>", "<float range>"), "N"),
    "<bool>": "",
}
"""Placeholders for option values: typer's -> ours, short so that environment variable names fit at 80 columns."""


HELP = {"-h", "--help"}
LONGEST = 14
"""Maximum width of a list of choices in the value column; a longer list is appended to the option's help."""


def _shorten(command: Any) -> None:
    """Set short value placeholders for the options of a command and its subcommands."""
    context = typer.Context(command)
    for parameter in command.get_params(context):
        if parameter.param_type_name != "option" or parameter.metavar is not None:
            continue
        shown = parameter.display_type(context) or ""
        parameter.metavar = SHORT.get(shown, "WORD" if len(shown) > LONGEST else None)
        if parameter.metavar == "WORD":
            parameter.help = f"{parameter.help} One of: {shown.strip('<>').replace('|', ', ')}."
    for inner in getattr(command, "commands", {}).values():
        _shorten(inner)


def whole() -> Any:
    """The group `deepar` with every command imported, for tools that inspect all commands."""
    every = typer.main.get_group(app)
    every.commands.update({one.name: _imported(one) for one in COMMANDS})
    return every


app = typer.Typer(
    name="deepar",
    cls=CommandTable,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Device-edge-cloud inference: cut a network after two layers, plan it, stream it.

    Begin with `deepar demo`. To send input of your own, start `deepar up deploy/serve.toml`, and ask `deepar infer`. On
    Kafka, start `deepar broker`, `deepar up FILE.toml` (or `planner` and `stage` one by one), send work with
    `deepar loadgen replay`, and watch `deepar tail decisions`.
    """,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"deepar {metadata.version('deepar')}")
        raise typer.Exit


def prepare_process(log_level: str) -> None:
    """Set up signals, logging and the garbage collector for a command that has been imported."""
    gc.freeze()  # what was imported stays until the end, so no collection visits it
    gc.enable()
    raise_interrupts()
    from deploy.services.telemetry.log_setup import (
        configure_logging,  # imported here: listing the commands needs no logging
    )

    configure_logging(log_level)


@app.callback()
def _root(
    context: typer.Context,
    log_level: Annotated[
        str,
        typer.Option(envvar="DEEPAR_LOG_LEVEL", help="Log level: debug, info, warning or error; logs go to stderr."),
    ] = "info",
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"--log-level {log_level}: must be debug, info, warning or error")
    prepare: Callable[[str], None] = context.obj
    prepare(log_level)


def main(prepare: Callable[[str], None] = prepare_process) -> NoReturn:
    """Run the command line. Garbage collection is off until the command is imported, since imports leave hardly any garbage.

    `prepare` sets up the process for a log level before the command runs.
    """
    gc.disable()  # saves a tenth of the processor time of a start
    try:
        _run(prepare)
    finally:
        gc.enable()  # a command that failed early has not done it


def _run(prepare: Callable[[str], None]) -> NoReturn:
    """Run the command line. A `DeeparError` is printed as one line, with its remedy, instead of a traceback."""
    if {"--help", "-h"} & set(sys.argv):
        importlib.import_module("deploy.console_output.help_tables").fold_long_words()
    try:
        code = app(prog_name="deepar", standalone_mode=False, obj=prepare)
        sys.stdout.flush()
        if code == TYPERS_INTERRUPTED:
            end_children()
            _exit(EXIT_INTERRUPTED)
        _exit(code if isinstance(code, int) else 0)
    except typer.Exit as finished:
        _exit(finished.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        end_children()
        _exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output closed the pipe (`| head`); without this, Python reports the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(0)
    except DeeparError as error:
        _exit(_complain(error))
    except OSError as error:
        if error.filename is None:
            raise
        # An unreadable file or a full disk is a fault of the machine, not a bug.
        _exit(_complain(DeeparError(f"{error.filename}: {error.strerror}")))
    except BaseExceptionGroup as group:
        ours, others = group.split(DeeparError)
        if ours is None or others is not None:
            raise
        first: BaseException = ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        assert isinstance(first, DeeparError)
        _exit(_complain(first))
    except Exception as error:
        # click's usage errors print themselves
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        _exit(getattr(error, "exit_code", EXIT_USAGE))


def _complain(error: DeeparError) -> int:
    console = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(str(error))}")
    if error.remedy:
        console.print(f"  [cyan]{escape(error.remedy)}[/]")
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
