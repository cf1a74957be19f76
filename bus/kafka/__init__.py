"""`KafkaBus`: the bus port on Apache Kafka, through aiokafka. aiokafka is imported in this wing and nowhere else.

Start with `bus`. Imports `bus` only; any room may import it.
"""
