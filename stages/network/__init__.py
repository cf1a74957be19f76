"""Sending over a link: the frame sender, the shaper, and the network that a node plays on its own link from a trace.

Imports `bus` and the clock of `stages.measuring`. The stages use it; settings read traces with it.
"""
