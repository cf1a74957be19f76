"""Replays over a bus: arrival patterns, schedules of tasks, what came of each task, and reports.

Start with `replay`. Imports the rooms below; every other wing of `loadgen` may import it.
"""
