"""The commands that run services: `deepar planner`, `stage`, `gateway`, `up`. Only `deploy.cli` and the tests import it."""
