"""What a service tells its operator: logs, health probes, metrics and traces.

Imports every room except the other wings of `deploy`; services and commands may import it.
"""
