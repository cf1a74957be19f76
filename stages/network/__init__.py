"""The network that a node plays on its own link: latency, and bandwidth over time from a trace.

Imports `bus` only. `stages.shaper` and the stages use it; settings and scenarios read traces with it.
"""
