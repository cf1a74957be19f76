"""What a task may use: edges, cloud and device, and how fast its model is on each, as profiled, learned and loaded.

Start with `candidates`. Imports `bus`, `planner.search`, `planner.learning` and `planner.core.region`; only `planner.core`
imports it.
"""
