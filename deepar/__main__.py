"""The program `deepar`: checks that Python finds DeePar's own packages, then runs the command line."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOMS = ("bus", "deploy", "loadgen", "planner", "stages")
"""DeePar's top-level packages. Their names are common, so a folder of the user may hide them."""

EXIT_USAGE, EXIT_INTERRUPTED = 2, 105


def main() -> NoReturn:
    """Run `deepar` with the arguments of the process."""
    # Before a command starts there is nothing to clean up, and an exception raised during an import may be swallowed:
    # so the process exits at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    for name in ROOMS:
        if (elsewhere := shadow(name)) is not None:
            _complain(name, elsewhere)
    from deploy.cli import main as run

    try:
        run()
    except KeyboardInterrupt:  # a second Ctrl-C while the first is handled
        sys.exit(EXIT_INTERRUPTED)
    finally:
        # A Ctrl-C while the interpreter shuts down exits without a traceback.
        signal.signal(signal.SIGINT, _leave)


def shadow(name: str) -> Path | None:
    """The foreign path from which Python would import `name`, or None if it finds our own package."""
    spec = find_spec(name)
    if spec is None:
        return None  # the later import reports it
    ours = (Path(__file__).resolve().parents[1] / name).resolve()
    places = [spec.origin] if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    found = [Path(place).resolve() for place in places if place]
    return None if not found or ours in found[:1] else found[0]


def _complain(name: str, elsewhere: Path) -> NoReturn:
    ours = Path(__file__).resolve().parents[1] / name
    print(
        f"error: {elsewhere} hides DeePar's own package `{name}`, which is {ours}\n"
        f"  Python searches {elsewhere.parent} first. Run DeePar in another folder, or as `python -P -m deepar` (leaves out\n"
        "  the current folder), or take that folder off PYTHONPATH, or rename the package there.",
        file=sys.stderr,
    )
    sys.exit(EXIT_USAGE)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
