"""Planner service: leads a region, filters its inputs, publishes decisions and writes snapshots.

Start with `service`. This wing imports `bus` and `planner.core`; `loadgen` and `deploy` may import it.
"""
