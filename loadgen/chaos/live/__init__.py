"""Faults on real processes: kill, stop and terminate each process in turn, and judge the raw topics.

Start with `campaign`. The `oracle` shares no code with the planner or the stages.
"""
