"""The soak test in virtual time: a region that works for hours while its nodes come and go, and one with a slow cloud.

Start with `soak`. Imports `loadgen.sim`.
"""
