"""The load generator: submits tasks and measures the system live, in simulation and under faults.

Imports `bus`, `planner` and `stages`; only `deploy` imports it. Every wing runs the real planner, live or in virtual
time. Wings: `replay`, `sim`, `experiments`, `bounds`, `bench`, `chaos`.
"""
