"""Scripts that tests run in an environment with the extra `solvers`, whose protobuf is not that of the other extras."""
