"""Headers of records: CloudEvents attributes, and the trace context with the ids of its spans.

Imports `bus`; every room may import it.
"""
