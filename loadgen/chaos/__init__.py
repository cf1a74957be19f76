"""Fault injection: `simulated` breaks a region in virtual time, `soak` runs one for hours, `live` breaks real processes.

Only `deploy` and the tests import these wings.
"""
