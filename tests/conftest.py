"""Fixtures for every test: pytest loads the modules that are named here."""

pytest_plugins = ["tests.kafka_broker", "tests.lanes"]
