"""Benchmarks: one module per benchmark, run by `deepar loadgen bench NAME`.

Imports `loadgen.sim` and `loadgen.replay`; only `deploy` imports it.
"""
