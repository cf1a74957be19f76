"""The one command, `deepar`: what each of its commands is, and how an error becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from dataclasses import dataclass
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from bus.errors import ConfigError, DeeparError
from deploy.log_setup import configure_logging
from deploy.process import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE

app = typer.Typer(
    name="deepar",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Device-edge-cloud inference: cut a network after two layers, plan it, stream it.

    Begin with `deepar demo`. Then start `deepar broker`, `deepar up FILE.toml` (or `planner` and `stage` one by one),
    send work with `deepar loadgen replay`, and watch `deepar tail decisions`.
    """,
)

TYPERS_INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt before we see it."""

RUN, SEE, MODELS = "Run", "See", "Models, plans and experiments"


@dataclass(frozen=True, slots=True)
class _Command:
    """Where a command lives. Its module is imported only if it is the one that was asked for, or for the list of all."""

    name: str
    panel: str
    module: str
    attribute: str


COMMANDS = (
    _Command("demo", RUN, "deploy.commands_demo", "demo"),
    _Command("broker", RUN, "deploy.commands_broker", "broker"),
    _Command("up", RUN, "deploy.commands_services", "up"),
    _Command("planner", RUN, "deploy.commands_services", "planner"),
    _Command("stage", RUN, "deploy.commands_services", "stage_app"),
    _Command("topics", RUN, "deploy.commands_topics", "topics_app"),
    _Command("acls", RUN, "deploy.commands_acls", "acls"),
    _Command("identity", RUN, "deploy.commands_identity", "app"),
    _Command("loadgen", RUN, "deploy.commands_loadgen", "app"),
    _Command("cancel", RUN, "deploy.commands_cancel", "cancel"),
    _Command("tail", SEE, "deploy.commands_tail", "tail_app"),
    _Command("top", SEE, "deploy.commands_top", "top"),
    _Command("ui", SEE, "deploy.commands_ui", "ui"),
    _Command("dead-letter", SEE, "deploy.commands_deadletter", "app"),
    _Command("explain", SEE, "deploy.commands_explain", "explain"),
    _Command("doctor", SEE, "deploy.commands_doctor", "doctor"),
    _Command("healthcheck", SEE, "deploy.healthcheck", "healthcheck"),
    _Command("models", MODELS, "deploy.commands_models", "app"),
    _Command("profile", MODELS, "deploy.commands_models", "profile"),
    _Command("plan", MODELS, "deploy.commands_plan", "plan"),
    _Command("simulate", MODELS, "deploy.commands_simulate", "app"),
)


@app.callback()
def _root(
    log_level: Annotated[
        str, typer.Option(envvar="DEEPAR_LOG_LEVEL", help="debug, info, warning or error; logs go to stderr.")
    ] = "info",
) -> None:
    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"--log-level {log_level}: it is debug, info, warning or error")
    configure_logging(log_level)


def _register(arguments: list[str]) -> None:
    """Add the command that is asked for; all of them where none is (`deepar --help`, a misspelt name)."""
    named = [command for command in COMMANDS if command.name in arguments[:3]]
    for command in named or COMMANDS:
        found = getattr(importlib.import_module(command.module), command.attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=command.name, rich_help_panel=command.panel)
        else:
            app.command(command.name, rich_help_panel=command.panel)(found)


def main() -> NoReturn:
    """Run the command line; every `DeeparError` becomes a line that says what is wrong and what to do."""
    _register(sys.argv[1:])
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        _exit(EXIT_INTERRUPTED if code == TYPERS_INTERRUPTED else code if isinstance(code, int) else 0)
    except typer.Exit as finished:
        _exit(finished.exit_code)
    except typer.Abort:
        _exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        _exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has seen enough (`| head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(0)
    except DeeparError as error:
        _exit(_complain(error))
    except OSError as error:
        if error.filename is None:
            raise
        # A file that cannot be read or written, a full disk: the machine's fault, not a bug.
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
        # click's own usage errors know how to show themselves
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        _exit(getattr(error, "exit_code", EXIT_USAGE))


def _complain(error: DeeparError) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
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
