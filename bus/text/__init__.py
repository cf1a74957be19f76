"""Text that people and programs outside read: JSON without NaN, and rates and durations with units.

Imports `bus.errors` only; any room may import it.
"""
