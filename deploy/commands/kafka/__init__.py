"""Commands about Kafka itself: the local broker, topics, access lists, and the records on the topics.

Only `deploy.cli` and the tests import it.
"""
