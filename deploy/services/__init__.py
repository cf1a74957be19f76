"""Services as processes: wiring, settings, signals, keys. The wing `telemetry` holds logs, probes, metrics and traces.

Start with `process` and `wiring`. The commands, the demo and the tests may import it.
"""
