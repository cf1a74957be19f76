"""The ledger of reservations on edges and devices: constraints (8)-(10) over time.

Start with `ledger`. Imports `bus`; all of `planner.search` and `planner.core` may import it.
"""
