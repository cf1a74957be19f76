"""The network that a node plays on its own link: latency, and bandwidth over time from a trace.

Imports `bus` and the clock of `stages.measuring`. `stages.shaper` and the stages use it; settings read traces with it.
"""
