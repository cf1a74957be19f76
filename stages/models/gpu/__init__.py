"""Segments on a GPU: a child process that holds the driver, the check against the CPU, and the return to the CPU.

`stages.litert_runner` imports it. No other process loads the driver, because it may crash, holds the GIL and logs a lot.
"""
