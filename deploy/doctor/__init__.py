"""The checks of `deepar doctor`: this machine, the regions, sites, sizes of records, identity.

Only the command `doctor` and the tests import it.
"""
