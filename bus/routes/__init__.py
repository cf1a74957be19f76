"""Several routes of one task: the shares of its samples, and the order in which samples take the routes.

Start with `shares`. Imports `bus` only; every room may import it.
"""
