"""The samples of one task under way: how many at once, and of several routes their shares and order.

Start with `shares`. Imports `bus` only; every room may import it.
"""
