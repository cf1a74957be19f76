"""Ctrl-C and SIGTERM interrupt a command while it waits, computes, starts its event loop, or collects garbage."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("heeds_interrupts")

ROOT = Path(__file__).parents[3]
BEGIN = """
import asyncio, os, signal
from deploy.interrupts import raise_interrupts
raise_interrupts()
def send(): os.kill(os.getpid(), signal.{name})
"""
COMPUTES = """
try:
    send()
    while True: pass
except KeyboardInterrupt:
    print("files written")
"""
WAITS = """
from deploy.services.process import run_on_uvloop
async def main():
    try:
        asyncio.get_running_loop().call_soon(send)
        await asyncio.Event().wait()
    finally:
        print("closed")
try:
    run_on_uvloop(main())
except KeyboardInterrupt:
    print("files written")
"""
COLLECTS = """
class Garbage:
    def __del__(self):
        send()
        while True: pass
Garbage()
while True: pass
"""
BEFORE = """
from deploy.services.process import run_on_uvloop
async def main(): pass
work = main()
import uvloop
made = uvloop.new_event_loop
uvloop.new_event_loop = lambda: (send(), made())[1]
try:
    run_on_uvloop(work)
except KeyboardInterrupt:
    print("files written")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (COMPUTES, 0, "files written\n"),
        (WAITS, 0, "closed\nfiles written\n"),
        (BEFORE, 0, "files written\n"),
        (COLLECTS, 105, ""),
    ],
    ids=["computes", "waits", "before", "collects"],
)
def test_both_signals_interrupt_the_command(script: str, code: int, said: str, number: signal.Signals) -> None:
    text = BEGIN.format(name=number.name) + script
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")
