"""What the planner learns from measurements: estimates of speeds, overheads and links, as values and pure functions.

Start with `estimates`. Imports `bus` and `planner.search`; the core imports it.
"""
