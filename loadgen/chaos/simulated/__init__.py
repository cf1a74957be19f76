"""Fault injection in virtual time: campaigns over seeds, the fault injector, monitors and final checks.

Start with `campaign` and `run`. Imports `loadgen.sim` and `loadgen.replay`.
"""
