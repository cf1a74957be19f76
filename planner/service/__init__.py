"""The planner as a service on the bus: leads a region, filters input, publishes decisions, writes snapshots.

Start with `service`. Imports `bus` and `planner.core`; the load generator and the command line may import it.
"""
