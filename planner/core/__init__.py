"""The planner's core: `PlannerCore.handle(event, now)` turns events into changes. No I/O, no clock, no randomness.

Start with `core`. Imports `bus`, `planner.search` and `planner.learning`; the service, the load generator and the command
line may import it.
"""
