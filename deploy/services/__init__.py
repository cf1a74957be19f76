"""Services as processes: wiring, settings, signals, probes, logs, traces, keys.

Start with `process` and `wiring`. The commands, the demo and the tests may import it.
"""
