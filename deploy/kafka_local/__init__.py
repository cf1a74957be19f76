"""A real Apache Kafka on this machine: its jars, its settings, its start and end.

Start with `broker`. Services, the commands and the tests may import it.
"""
