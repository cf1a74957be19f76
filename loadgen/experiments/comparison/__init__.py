"""Comparison of simulated and live runs of one scenario (`deepar simulate compare`), with its chart.

Start with `compare`. Imports `loadgen.sim` and `loadgen.replay`; the command line may import it.
"""
