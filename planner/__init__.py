"""The planner room: it decides where each task is cut, which edge it uses, with how much bandwidth, and when it starts.

It imports `bus` only; `loadgen` and `deploy` import it. `core` turns events into changes without I/O, `search` holds the
mathematics of one decision, `service` connects the core to the bus, and `explain` tells why a task was placed as it was.
"""
