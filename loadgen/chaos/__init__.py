"""Fault injection: `simulated` breaks a region in virtual time, `live` breaks real processes on a real broker.

Only `deploy` and the tests import these wings.
"""
