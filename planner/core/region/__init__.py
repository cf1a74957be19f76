"""The state of one region: its tasks, nodes, circuits, timers and ledger, and the transitions that a task may make.

Start with `state`: `RegionState.apply` is the only mutator. Imports `bus`, `planner.search`
and `planner.learning`; `planner.core` imports it.
"""
