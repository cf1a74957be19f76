"""The mathematics of one decision: delays (1)-(7), the exact cut search, the ledger of reservations, Algorithm 1, policies.

Start with `cost`. Imports `bus` only; any part of the planner, the load generator and the command line may import it.
"""
