"""Benchmarks: one module a benchmark, each printed by `deepar loadgen bench NAME`.

Imports `loadgen.sim` and `loadgen.replay`; only `deploy` imports it.
"""
