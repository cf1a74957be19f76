"""Faults in virtual time: seeds, the faults they draw, what is judged while a seed runs and at its end, and the soak.

Start with `campaign` and `run`. Imports `loadgen.sim` and `loadgen.replay`.
"""
