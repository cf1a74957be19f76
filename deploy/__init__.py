"""Where everything is put together: the command line, services as processes, monitoring, the local broker, containers.

May import every room; nothing imports it but the tests and the `deepar` package.
"""
