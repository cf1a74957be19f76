"""Replays over a bus: arrival patterns, task schedules, task outcomes, and reports.

Start with `replay`. Imports `bus`, `planner` and `stages`; every other wing of `loadgen` may import it.
"""
