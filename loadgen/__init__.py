"""Who submits tasks, and what came of them: arrivals, sources of tasks, replay over the bus, the simulators,
the paper's figures.

This room may import `bus`, `planner` and `stages`; only `deploy` imports it. Nothing here decides about a
task: live or in virtual time, the planner that decides is the real one.
"""
