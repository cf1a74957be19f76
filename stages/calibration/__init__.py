"""Measurements on a model's own activations: of codecs (sizes, speed, agreement of the outputs) and of layers in batches.

Start at `measurement`. Imports `bus`, `stages.models` and `stages.zoo`; the runner of a stage and the commands import it.
"""
