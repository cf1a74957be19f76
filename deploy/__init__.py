"""The room that assembles the system: command line, services as processes, monitoring, local broker, containers.

May import every room; nothing imports it but the tests and the `deepar` package.
"""
