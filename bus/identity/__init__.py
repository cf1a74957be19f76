"""Proofs of identity: keys, signatures of records and frames, and the table of who may claim what.

Start with `keys`. Imports `bus` only; any room may import it.
"""
