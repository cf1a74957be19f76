"""The one command, `deepar`: what each of its commands is, and how an error becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from bus.errors import ConfigError, DeeparError
from deploy import commands_services, commands_tail
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

RUN, SEE, MODELS = "Run", "See", "Models, plans and experiments"


@app.callback()
def _root(
    log_level: Annotated[
        str, typer.Option(envvar="DEEPAR_LOG_LEVEL", help="debug, info, warning or error; logs go to stderr.")
    ] = "info",
) -> None:
    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"--log-level {log_level}: it is debug, info, warning or error")
    configure_logging(log_level)


def _register() -> None:
    from deploy import commands_broker, commands_demo, commands_doctor

    app.command("demo", rich_help_panel=RUN)(commands_demo.demo)
    app.command("broker", rich_help_panel=RUN)(commands_broker.broker)
    app.command("up", rich_help_panel=RUN)(commands_services.up)
    app.command("planner", rich_help_panel=RUN)(commands_services.planner)
    app.add_typer(commands_services.stage_app, name="stage", rich_help_panel=RUN)
    app.add_typer(commands_services.topics_app, name="topics", rich_help_panel=RUN)
    app.command("healthcheck", rich_help_panel=SEE)(commands_services.healthcheck)
    app.add_typer(commands_tail.tail_app, name="tail", rich_help_panel=SEE)
    app.command("doctor", rich_help_panel=SEE)(commands_doctor.doctor)
    _register_rooms()


def _register_rooms() -> None:
    from deploy import commands_loadgen, commands_models, commands_plan, commands_simulate

    app.add_typer(commands_loadgen.app, name="loadgen", rich_help_panel=RUN)
    app.add_typer(commands_models.app, name="models", rich_help_panel=MODELS)
    app.command("profile", rich_help_panel=MODELS)(commands_models.profile)
    app.command("plan", rich_help_panel=MODELS)(commands_plan.plan)
    app.command("explain", rich_help_panel=SEE)(commands_plan.explain)
    app.add_typer(commands_simulate.app, name="simulate", rich_help_panel=MODELS)


def main() -> NoReturn:
    """Run the command line; every `DeeparError` becomes a line that says what is wrong and what to do."""
    _register()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        _exit(code if isinstance(code, int) else 0)
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
    console.print(f"[bold red]error:[/] {_plain(str(error))}")
    if error.remedy:
        console.print(f"  [cyan]{_plain(error.remedy)}[/]")
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
