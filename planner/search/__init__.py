"""The mathematics of one decision: delays (1)-(7), exact cut search, ledger of reservations, Algorithm 1, and policies.

Start with `cost`. Imports `bus` only; any part of the planner, the load generator and the command line may import it.
"""
