"""A local Apache Kafka: its jars, settings, start and stop.

Start with `broker`. Services, the commands and the tests may import it.
"""
