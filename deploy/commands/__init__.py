"""The command line, one module a command, named after it. A command parses, calls, and prints; it computes nothing.

Only `deploy.cli` and the tests import it.
"""
