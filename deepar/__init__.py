"""DeePar: device-edge-cloud inference. Cut a network after two layers, plan it, stream it over Kafka.

The package holds the version and the program: `deepar` and `python -m deepar` are `deepar.__main__.main`. It imports only the
standard library, so that the program can say what is wrong with an installation before it uses it.
"""

__version__ = "0.1.0"
