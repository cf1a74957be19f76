"""`deepar demo`: a cloud, two edges and four devices in this process, and the chart of its run.

Only the command `demo` and the tests import it.
"""
