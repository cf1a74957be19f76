"""Simulation: an event loop on virtual time, scenarios, and two simulators (core only, and all live code).

Start with `scenario` and `simulator`. Imports `loadgen.replay`; experiments, benchmarks and chaos may import it.
"""
