"""How a node takes part in its region: settings, readiness, lease, fences, spans of its work.

`stages.node` puts the parts together. Imports `bus` and `stages.network`; the stages, the load generator and
the command line may import it.
"""
