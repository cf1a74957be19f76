"""Proofs of identity: keys, signatures of records and frames, and the authorization table.

Start with `keys`. Imports `bus` only; any room may import it.
"""
