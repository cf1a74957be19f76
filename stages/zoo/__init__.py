"""The models supplied with DeePar: their networks, files and test digits.

Start with `registry`, which loads any model. The wing imports `bus` and `stages.models`; the stages, the load generator and
the command line may import it.
"""
